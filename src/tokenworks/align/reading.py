"""Policy and reference read a batch of responses, and a preference method gets the numbers that it needs of them.

    batch = collate([encode_pair(tokenizer, prompt, chosen, rejected)])
    pairs = read_pairs(policy, reference, batch, method.needs)

Only response tokens ever meet the vocabulary. A model takes part with one more keyword of its `forward`, so that
whatever wraps it (LoRA, DistributedDataParallel, FSDP) stays in force while its head is used.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.align.contract import Needs, Pairs
from tokenworks.align.vocabulary import Head, check_head, vocabulary_terms
from tokenworks.core.errors import InputError

Using = Callable[[nn.Module, Any], dict[str, Tensor]]
"""Given a model and what its layers returned, without its head."""


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair; `scores` as many numbers as the response has tokens, if the data has any."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_scores: list[float] | None = None
    rejected_scores: list[float] | None = None


@dataclass(frozen=True)
class Batch:
    """B pairs as 2B padded rows, chosen first.

    Attributes:
        input_ids: int64 [2B, S]; attention_mask: int64 [2B, S].
        mask: bool [2B, S - 1], whether the token after each is of a response.
        scores: float32 [2B, S - 1], of the tokens after each; None if the data has none.
        embeds: float [2B, S, d], read in place of `input_ids` if given.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    scores: Tensor | None = None
    embeds: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the models are called with."""
        read = {"input_ids": self.input_ids} if self.embeds is None else {"inputs_embeds": self.embeds}
        return {**read, "attention_mask": self.attention_mask}

    @property
    def labels(self) -> Tensor:
        """int64 [2B, S - 1]: the tokens after each."""
        return self.input_ids[:, 1:]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str) -> EncodedPair:
    """A pair of plain texts; each response is tokenized by itself and ends with the end of text."""
    end = [tokenizer.eos_token_id]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return EncodedPair(list(tokenizer(prompt)["input_ids"]), ids(chosen) + end, ids(rejected) + end)


def collate(pairs: Sequence[EncodedPair], pad_id: int = 0) -> Batch:
    """Pad pairs to one length, on the right.

    Raises:
        InputError: no pairs, or a response without tokens.
    """
    if not pairs:
        raise InputError("pairs: empty; give at least one")
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scored = [pair.chosen_scores for pair in pairs] + [pair.rejected_scores for pair in pairs]
    if not all(prompts) or not all(responses):
        raise InputError("pairs: an empty prompt or response; every one needs at least one token")
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), longest), pad_id)
    attention = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    scores = torch.zeros(len(prompts), longest)
    for row, (prompt, response, numbers) in enumerate(zip(prompts, responses, scored, strict=True)):
        begin, end = len(prompt), len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        attention[row, :end] = 1
        mask[row, begin:end] = True
        if numbers is not None:
            scores[row, begin:end] = torch.tensor(numbers)
    has_scores = all(numbers is not None for numbers in scored)
    return Batch(ids, attention, mask[:, 1:], scores[:, 1:] if has_scores else None)


def let_read(model: nn.Module) -> None:
    """Give a causal language model's `forward` the keyword `using`; without it nothing changes.

    Raises:
        UnsupportedModelError: see `check_head`.
    """
    if hasattr(model, "lets_read"):
        return
    check_head(model)
    # Of what was put over the class's own, as accelerate does, there is only the bound method; but a copy of a
    # model should run itself.
    over = model.__dict__.get("forward")

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, using: Using | None = None, **kwargs: Any) -> Any:
        if using is None:
            return over(*args, **kwargs) if over is not None else type(self).forward(self, *args, **kwargs)
        # The layers are looked up at each call: what wraps models replaces them.
        return using(self, self.base_model(*args, use_cache=False, **kwargs))

    model.forward = types.MethodType(forward, model)
    model.lets_read = True  # type: ignore[assignment]


def read_reference(reference: Callable[..., Any], batch: Batch, needs: Needs) -> ReferenceRead:
    """What the policy's pass needs of the reference, and what it says itself of the response tokens."""
    kept: list[ReferenceRead] = []

    def using(model: nn.Module, found: Any) -> dict[str, Tensor]:
        # A divergence reads the head again in the policy's pass and on the way back.
        head = Head.lasting(model) if needs.divergence else Head.of(model)
        hidden = found.last_hidden_state[:, :-1][batch.mask]
        states = None
        if needs.states:
            states = torch.stack([layer[:, :-1][batch.mask] for layer in found.hidden_states[1:]], 1)
        # A divergence asks the reference for its distributions anyway, and so for these.
        log_p = None if needs.divergence else vocabulary_terms(head, hidden, batch.labels[batch.mask]).log_p
        kept.append(ReferenceRead(head, hidden, states, log_p))
        return {"hidden": hidden}

    with torch.no_grad():
        reference(**batch.inputs, using=using, **({"output_hidden_states": True} if needs.states else {}))
    return kept[0]


@dataclass(frozen=True)
class ReferenceRead:
    """Of the reference, at the N response tokens: head, last states [N, d], all its layers' [N, L, d] if asked
    for, and log-probabilities [N] where no divergence will find them."""

    head: Head
    hidden: Tensor
    states: Tensor | None
    log_p: Tensor | None


def read_policy(
    policy: Callable[..., Any], batch: Batch, reference: ReferenceRead, needs: Needs
) -> dict[str, Tensor]:
    """Of the N response tokens "log_p" and "divergence" of the policy, with gradient, its "entropy", and
    "log_ref" of the reference."""
    teacher = reference.head.teacher(reference.hidden) if needs.divergence else None

    def using(model: nn.Module, found: Any) -> dict[str, Tensor]:
        hidden = found.last_hidden_state[:, :-1][batch.mask]
        direction = "forward" if needs.divergence else None
        terms = vocabulary_terms(Head.of(model), hidden, batch.labels[batch.mask], teacher, direction)  # type: ignore[arg-type]
        log_ref = terms.teacher_log_p if reference.log_p is None else reference.log_p
        return {
            "log_p": terms.log_p, "divergence": terms.divergence, "entropy": terms.entropy, "log_ref": log_ref,
        }  # fmt: skip

    found: dict[str, Tensor] = policy(**batch.inputs, using=using)
    return found


def join_pairs(batch: Batch, reference: ReferenceRead, policy: dict[str, Tensor], needs: Needs) -> Pairs:
    """The numbers of both models as rows of the batch."""

    def rows(values: Tensor) -> Tensor:
        return torch.zeros(batch.mask.shape, device=values.device).masked_scatter(batch.mask, values)

    states = None
    if reference.states is not None:
        states = reference.states.new_zeros(*batch.mask.shape, *reference.states.shape[1:])
        states[batch.mask] = reference.states
    return Pairs(
        rows(policy["log_p"]),
        rows(policy["log_ref"]),
        batch.mask,
        rows(policy["divergence"]) if needs.divergence else None,
        batch.scores if needs.scores else None,
        states,
    )


def read_pairs(policy: PreTrainedModel, reference: PreTrainedModel, batch: Batch, needs: Needs) -> Pairs:
    """Both models over a batch; the policy with gradient unless it is switched off.

    Raises:
        InputError: the vocabularies differ, or the method needs scores that the data does not have.
    """
    check_same_vocabulary(policy, reference)
    if needs.scores and batch.scores is None:
        raise InputError(f"batch: it has no scores, and the method needs {needs.scores}")
    for model in (policy, reference):
        let_read(model)
    found = read_reference(reference, batch, needs)
    return join_pairs(batch, found, read_policy(policy, batch, found, needs), needs)


def check_same_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Raise `InputError` where two models cannot have the same tokens."""
    ours, theirs = (own.get_output_embeddings().weight.shape[0] for own in (policy, reference))  # type: ignore[operator]
    if ours != theirs:
        raise InputError(
            f"ref_model: it knows {theirs} tokens and the policy {ours}; both must come from the same model"
        )


def check_sharding(args: Any) -> None:
    """Raise `InputError` for training arguments under which no head could be read."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError("deepspeed: ZeRO stage 3 keeps no whole head on any process; use stage 2, or FSDP")
