"""AlignDistil (arXiv 2503.02832): alignment as distillation from a teacher that two models make at every token.

A model trained with DPO and one trained with the preferences reversed agree on most tokens. Where they do not, the
teacher goes on in the direction from the second to the first, the further the more they differ:

    d = sum_v |dpo(v) - reverse(v)|        alpha = strength d + floor        beta = beta0 / alpha
    teacher = softmax(log dpo + alpha (log dpo - log reverse))
    loss = mean over texts of (1 / length) sum over tokens of beta KL(policy || teacher)

With k for alpha, beta KL(policy || teacher) = beta KL(policy || anchor) - E_policy[reward] + const, where reward
is beta0 (log dpo - log other): RLHF at that token, over the whole vocabulary, with the anchor as reference. That
is so for the prefixes as they come. Over whole texts the optimum of RLHF also looks ahead to the tokens that
follow, and is the teacher only where beta = beta0 and the anchor is the reference (both are then the DPO model).

`AlignDistilTrainer` (in `aligndistil_trainer`) trains with it; `AlignDistilLogitsProcessor` writes with the
teacher itself, without training. The distance d has no factor of a half, as in the authors' code: it is in [0, 2].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.align.contract import check_not_negative, check_positive
from tokenworks.align.reading import check_same_vocabulary
from tokenworks.align.scores import response_states
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.errors import InputError
from tokenworks.core.trace import Trace

Mode = Literal["aligndistil", "contrast", "theorem1", "theorem1_adaptive", "gkd"]
"""How the teacher is made: of the DPO and the reverse model with alpha by token, or the same for all; of the DPO
model and the reference with the same k for all (Theorem 1), or by token; or the DPO model itself."""

CONTRASTIVE, AGAINST_REFERENCE = ("aligndistil", "contrast"), ("theorem1", "theorem1_adaptive")
MODES = (*CONTRASTIVE, *AGAINST_REFERENCE, "gkd")
ADAPTIVE = ("aligndistil", "theorem1_adaptive")


class Taught(NamedTuple):
    """A teacher at some tokens, without gradient.

    Attributes:
        log_probs: float32 [..., V].
        alpha: float32 [...], how far beyond the anchor it goes.
        beta: float32 [...], beta0 / alpha, the weight of the divergence to it.
    """

    log_probs: Tensor
    alpha: Tensor
    beta: Tensor


def check_settings(mode: str, strength: float, beta0: float, floor: float = 1e-3, plausible: float = 0.0) -> None:
    """Raise `InputError` for a mode that there is not, or a number out of range."""
    if mode not in MODES:
        raise InputError(f"mode: there is no {mode!r}; choose one of {', '.join(MODES)}")
    check_positive(beta0=beta0, floor=floor)
    if not 0 <= plausible <= 1:
        raise InputError(f"plausible: {plausible} is not in [0, 1]")
    if mode in ADAPTIVE:
        check_not_negative(strength=strength)
    elif mode != "gkd":
        check_positive(strength=strength)


@torch.no_grad()
def compose_teacher(
    log_dpo: Tensor,
    log_other: Tensor | None,
    mode: Mode = "aligndistil",
    strength: float = 15.0,
    beta0: float = 0.1,
    floor: float = 1e-3,
    plausible: float = 0.0,
) -> Taught:
    """The teacher at every token.

    Args:
        log_dpo: float [..., V], log-probabilities or logits of the DPO model.
        log_other: the same of the reverse model ("aligndistil", "contrast") or of the reference ("theorem1",
            "theorem1_adaptive"); None in mode "gkd".
        strength: c of alpha = c d + floor, or k itself; the authors take 15 on-policy and 10 off.
        beta0: above 0, of the DPO that the models were trained with.
        floor: above 0; keeps beta finite where the models agree.
        plausible: in [0, 1]. Tokens that the DPO model holds less likely than this times its likeliest one keep
            their weight from the anchor: far in the tail the models' differences are noise, and are large. (Not
            the paper's; 0 leaves it out.)

    Raises:
        InputError: a number out of range, shapes that differ, or no other model where one is needed.
    """
    check_settings(mode, strength, beta0, floor, plausible)
    log_p = torch.log_softmax(log_dpo.float(), -1)
    if mode == "gkd":
        alpha = torch.ones_like(log_p[..., 0])
        return Taught(log_p, alpha, beta0 * alpha)
    if log_other is None:
        raise InputError(
            f"log_other: mode {mode!r} needs the {'reverse model' if mode in CONTRASTIVE else 'reference'}"
        )
    if log_other.shape != log_dpo.shape:
        raise InputError(f"log_other: shape {list(log_other.shape)}, and log_dpo has {list(log_dpo.shape)}")
    log_q = torch.log_softmax(log_other.float(), -1)
    alpha = torch.full_like(log_p[..., 0], strength)
    if mode in ADAPTIVE:
        alpha = strength * distance(log_p, log_q) + floor
    along = log_p.sub(log_q).mul_(alpha[..., None])  # the difference, alpha times
    if plausible:
        along[log_p < log_p.amax(-1, keepdim=True) + math.log(plausible)] = 0
    teacher = along.add_(log_p if mode in CONTRASTIVE else log_q)
    return Taught(torch.log_softmax(teacher, -1), alpha, beta0 / alpha)


def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v |p - q| of log-probabilities [..., V]: in [0, 2], twice the total variation."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1)


class Composed:
    """A teacher for `vocabulary_terms`: composed for a stretch of tokens whenever that is asked for, so that the
    distributions of all tokens never exist at once; `alpha` and `beta` [N] are kept.

    Args:
        dpo, other: a head and its states [N, d]; `other` is None in mode "gkd".
    """

    def __init__(
        self,
        dpo: tuple[Head, Tensor],
        other: tuple[Head, Tensor] | None,
        mode: Mode,
        strength: float,
        beta0: float,
        plausible: float = 0.0,
    ) -> None:
        check_settings(mode, strength, beta0, plausible=plausible)
        self._models = (dpo, other)
        self._settings = (mode, strength, beta0)
        self._plausible = plausible
        self.alpha = torch.zeros(len(dpo[1]), device=dpo[1].device)
        self.beta = torch.zeros_like(self.alpha)

    @torch.no_grad()
    def __call__(self, part: slice) -> Tensor:
        log_dpo, log_other = (own and own[0].log_probs(own[1][part]) for own in self._models)
        assert log_dpo is not None
        found = compose_teacher(log_dpo, log_other, *self._settings, plausible=self._plausible)
        self.alpha[part], self.beta[part] = found.alpha, found.beta
        return found.log_probs


def distil_loss(divergence: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
    """The mean over texts of the mean over tokens of beta KL(policy || teacher).

    Args:
        divergence, beta: float [B, T]; mask: bool [B, T].

    Raises:
        InputError: a text without tokens.
    """
    if not mask.any(1).all():
        raise InputError("mask: a text has no token to learn from; leave it out")
    each = torch.where(mask, beta * divergence, 0.0).sum(1) / mask.sum(1)
    return each.mean()


def distil_trace(
    policy: PreTrainedModel,
    dpo_model: PreTrainedModel,
    other_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    mode: Mode = "aligndistil",
    strength: float = 15.0,
    beta0: float = 0.1,
) -> Trace:
    """What the teacher wants of each token of a response: channels "alpha", "beta", "divergence" (from policy to
    teacher, in nats) and "push" (log of teacher by policy for the token itself)."""
    ids: Sequence[int] = tokenizer(response, add_special_tokens=False)["input_ids"]
    begin: Sequence[int] = tokenizer(prompt)["input_ids"]
    models = [model for model in (policy, dpo_model, other_model) if model is not None]
    for model in models[1:]:
        check_same_vocabulary(policy, model)
    read = [(Head.of(model), response_states(model, begin, ids)) for model in models]
    teacher = Composed(read[1], read[2] if len(read) > 2 else None, mode, strength, beta0)
    with torch.no_grad():
        terms = vocabulary_terms(*read[0], torch.tensor(ids, device=read[0][1].device), teacher, "reverse")
    trace = Trace.from_ids(ids, tokenizer)
    push = (terms.teacher_log_p - terms.log_p).tolist()
    widest = max(map(abs, push), default=1.0) or 1.0
    trace.add("alpha", teacher.alpha.tolist(), "how far the teacher goes beyond its anchor")
    trace.add("beta", teacher.beta.tolist(), "weight of the divergence to the teacher, beta0 / alpha")
    trace.add(
        "divergence", terms.divergence.tolist(), "KL(policy || teacher) where the token was written, in nats"
    )
    trace.add("push", push, "log(teacher / policy) of the token itself, in nats", -widest, widest)
    trace.meta |= {"title": f"{mode}: {prompt}"[:90], "mode": mode, "strength": strength}
    return trace


class AlignDistilLogitsProcessor(LogitsProcessor):
    """Writes with the teacher, for `model.generate(..., logits_processor=[AlignDistilLogitsProcessor(dpo, rev)])`.

    The scores of the model that generates are replaced; it is best the cheapest one with the same vocabulary. The
    other two read along with caches of their own, and begin anew when the texts do or a beam search reorders them.

    Args:
        other_model: the reverse model or the reference, as the mode has it.
        pad_token_id: what shorter prompts are padded with, on the left; None if nothing is padded.

    Raises:
        InputError: the vocabularies differ, or a number is out of range.
    """

    def __init__(
        self,
        dpo_model: PreTrainedModel,
        other_model: PreTrainedModel | None,
        mode: Mode = "aligndistil",
        strength: float = 15.0,
        beta0: float = 0.1,
        pad_token_id: int | None = None,
    ) -> None:
        check_settings(mode, strength, beta0)
        if other_model is None and mode != "gkd":
            raise InputError(f"other_model: mode {mode!r} needs one")
        if other_model is not None:
            check_same_vocabulary(dpo_model, other_model)
        self._models = [dpo_model, *([] if other_model is None else [other_model])]
        self._settings = (mode, strength, beta0)
        self._pad = pad_token_id
        self._seen: Tensor | None = None
        self._caches: list[Any] = []

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        known = self._seen is not None and input_ids.shape[1] == self._seen.shape[1] + 1
        if not known or not torch.equal(input_ids[:, :-1], self._seen):  # type: ignore[arg-type]
            self._caches, known = [DynamicCache() for _ in self._models], False
        attention = torch.ones_like(input_ids)
        if self._pad is not None:
            attention = (input_ids != self._pad).long().cummax(1).values
        new = input_ids[:, -1:] if known else input_ids
        places = (attention.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        found = [
            model(
                input_ids=new, attention_mask=attention, position_ids=places, past_key_values=cache, use_cache=True
            ).logits[:, -1]
            for model, cache in zip(self._models, self._caches, strict=True)
        ]
        self._seen = input_ids.clone()
        return compose_teacher(found[0], found[1] if len(found) > 1 else None, *self._settings).log_probs
