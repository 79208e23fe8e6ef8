"""From r to Q* (arXiv 2404.12358): what a pair of policy and reference says that every token is worth.

A model trained with DPO is, up to a constant at each state, the Q function of a reward at every token, and

    beta log policy(a | s) / ref(a | s) = r(s, a) + V(s a) - V(s)

is that reward with its potential. Nothing is trained here; any policy and its reference can be read:

    reader = ImplicitTokenReward(policy, reference, beta=0.1)
    print(reader.report(tokenizer, "The film was", " dull, but the seats were lovely.").to_terminal("reward"))

What such numbers do not say: tokens of different states differ also by the potential, and sums over texts of
different prompts by V of the prompt; only texts of one prompt can be compared. The mean over what the reference
would write, -beta KL(reference || policy), is never positive: where the reference was tuned on the chosen texts,
their implicit rewards can only fall. `align.search` looks for texts by these numbers, `align.soft_q` has the
theory in exact form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.align.contract import check_positive
from tokenworks.align.reading import check_same_vocabulary
from tokenworks.align.vocabulary import Head, check_head, vocabulary_terms
from tokenworks.core.errors import InputError
from tokenworks.core.trace import Trace

IGNORED = -100
"""The label of a token that is none of the response's."""

LOW = -1.0
"""Tokens with z-scores from here down are what a report points to."""


class ImplicitTokenReward:
    """Reads a policy and its reference.

    Args:
        beta: above 0, of the DPO that the policy was trained with; it only scales what is read.

    Padding may stand on either side. Both models should be in evaluation mode and of one precision: a quantised
    reference under a float32 policy looks like rewards of some tenths.

    Raises:
        InputError: beta out of range, or the vocabularies differ.
        UnsupportedModelError: a model's head cannot be followed.
    """

    def __init__(self, model: PreTrainedModel, reference: PreTrainedModel, beta: float = 0.1) -> None:
        check_positive(beta=beta)
        check_same_vocabulary(model, reference)
        for each in (model, reference):
            check_head(each)
        self.model, self.reference, self.beta = model, reference, beta

    @torch.no_grad()
    def token_rewards(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """beta log(policy / reference) of every token of the responses.

        Args:
            input_ids, attention_mask: int64 [B, S].
            labels: int64 [B, S], the ids where they are of the response, its end of text included, else -100.

        Returns:
            float32 [B, S - 1], at [b, t] of the token at t + 1; 0 outside the responses.

        Raises:
            InputError: shapes that differ, or a row without a response.
        """
        inside = self._inside(input_ids, attention_mask, labels)
        ours, theirs = (
            vocabulary_terms(
                Head.of(model), _states(model, input_ids, attention_mask)[inside], labels[:, 1:][inside]
            )
            for model in (self.model, self.reference)
        )
        found = torch.zeros(inside.shape, device=input_ids.device)
        return found.masked_scatter(inside, self.beta * (ours.log_p - theirs.log_p))

    def sequence_reward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The sums over responses, float32 [B]: TRL's `rewards/chosen` and `rewards/rejected`."""
        return self.token_rewards(input_ids, attention_mask, labels).sum(1)

    @torch.no_grad()
    def advantages(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """beta log(policy / reference) of the whole vocabulary after every token: float32 [B, S, V]."""
        ours, theirs = self._log_probs(input_ids, attention_mask)
        return self.beta * (ours - theirs)

    @torch.no_grad()
    def q_values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Q(s, a) - V(s) = beta log policy, which includes the price of leaving the reference: [B, S, V]."""
        return self.beta * self._log_probs(input_ids, attention_mask)[0]

    @torch.no_grad()
    def expected_reference_reward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """-beta KL(reference || policy) after every token, float32 [B, S]: the mean reward of what the reference
        would say next. Never above 0."""
        ours, theirs = self._log_probs(input_ids, attention_mask)
        return self.beta * (theirs.exp() * (ours - theirs)).sum(-1)

    @torch.no_grad()
    def report(self, tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Trace:
        """What each token of a response is credited with.

        Channels: "reward"; "z", in standard deviations from the response's mean; "expected", the mean reward of
        what the reference would have said there; "log_p" and "log_ref". `meta["lowest"]` lists the stretches of
        tokens with z of -1 and less, the lowest first, as {start, end, text, reward}.

        Raises:
            InputError: an empty prompt or response.
        """
        begin = list(tokenizer(prompt)["input_ids"]) if prompt else []
        ids = list(tokenizer(response, add_special_tokens=False)["input_ids"]) if response else []
        if not begin or not ids:
            raise InputError("prompt, response: empty; both need at least one token")
        ours, theirs = self._log_probs(torch.tensor([begin + ids], device=self.model.device), None)
        places = torch.arange(len(begin) - 1, len(begin) + len(ids) - 1, device=ours.device)
        chosen = torch.tensor(ids, device=ours.device)
        log_p, log_ref = ours[0, places, chosen], theirs[0, places, chosen]
        expected = self.beta * (theirs[0, places].exp() * (ours[0, places] - theirs[0, places])).sum(-1)
        rewards = self.beta * (log_p - log_ref)
        spread = float(rewards.std()) if len(ids) > 1 else 0.0
        z = (rewards - rewards.mean()) / spread if spread else torch.zeros_like(rewards)
        trace = Trace.from_ids(ids, tokenizer)
        widest = float(rewards.abs().max()) or 1.0
        trace.add("reward", rewards.tolist(), "beta log(policy / reference), in nats", -widest, widest)
        trace.add("z", z.tolist(), "the reward in standard deviations from the response's mean")
        trace.add("expected", expected.tolist(), "mean reward of what the reference would say here, in nats")
        trace.add("log_p", log_p.tolist(), "under the policy, in nats")
        trace.add("log_ref", log_ref.tolist(), "under the reference, in nats")
        trace.meta |= {
            "title": f"credit: {prompt}"[:90],
            "reward": float(rewards.sum()),
            "lowest": _low_stretches(trace.tokens, rewards.tolist(), z.tolist()),
        }
        return trace

    def _log_probs(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """float32 [B, S, V] of policy and reference."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ours, theirs = (
            Head.of(model).log_probs(_states(model, input_ids, mask, whole=True))
            for model in (self.model, self.reference)
        )
        return ours, theirs

    @staticmethod
    def _inside(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        if not input_ids.shape == attention_mask.shape == labels.shape or input_ids.dim() != 2:
            raise InputError(
                f"labels: {list(labels.shape)}, with ids {list(input_ids.shape)} and mask "
                f"{list(attention_mask.shape)}; all three are [B, S]"
            )
        inside = (labels[:, 1:] != IGNORED) & attention_mask[:, 1:].bool()
        # A token can only be predicted from one before it.
        inside &= attention_mask[:, :-1].bool()
        if not inside.any(1).all():
            raise InputError("labels: a row has no response token; at least one is needed, behind a prompt")
        return inside


def _states(model: Any, input_ids: Tensor, attention_mask: Tensor, whole: bool = False) -> Tensor:
    """The last states [B, S - 1, d] that tokens are predicted from; all S if `whole`."""
    places = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    found: Tensor = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False
    ).last_hidden_state
    return found if whole else found[:, :-1]


def _low_stretches(tokens: list[str], rewards: list[float], z: list[float]) -> list[dict[str, Any]]:
    stretches: list[dict[str, Any]] = []
    for place, (token, reward, score) in enumerate(zip(tokens, rewards, z, strict=True)):
        if score > LOW:
            continue
        if stretches and stretches[-1]["end"] == place:
            last = stretches[-1]
            last |= {"end": place + 1, "text": last["text"] + token, "reward": last["reward"] + reward}
        else:
            stretches.append({"start": place, "end": place + 1, "text": token, "reward": reward})
    return sorted(stretches, key=lambda stretch: float(stretch["reward"]))
