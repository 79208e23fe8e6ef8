"""The contract of token-level preference methods: per-token numbers of a batch in, a loss and channels out.

A method never sees a model. Whatever it needs of one, it names (`Needs`), and whoever runs it (the trainer, the
explainer, a reproduction) computes that once for all methods:

    method = TDPO(beta=0.1, alpha=0.5)
    outcome = method(pairs)          # outcome.loss.mean().backward()

Everything is per response token: log-probabilities under policy and reference, and where asked for the divergence
over the vocabulary, a score of the data's own, or the reference's states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tokenworks.core.errors import InputError


@dataclass(frozen=True)
class Needs:
    """What a method asks for beyond log-probabilities.

    Attributes:
        divergence: KL(reference || policy) over the vocabulary at every token.
        scores: what the per-token scores of the data are, in words; empty if none are needed.
        states: the reference's hidden states.
    """

    divergence: bool = False
    scores: str = ""
    states: bool = False


@dataclass(frozen=True)
class Pairs:
    """B pairs as 2B responses, chosen first, of T tokens each; what is not a response token is 0 everywhere.

    Attributes:
        log_p: float32 [2B, T], of each response token under the policy.
        log_ref: float32 [2B, T], the same under the reference, without gradient.
        mask: bool [2B, T], the response tokens, the end of the text included.
        divergence: float32 [2B, T], KL(reference || policy) where each token was written, if asked for.
        scores: float32 [2B, T], of the data, if asked for.
        states: float [2B, T, L, d], of the reference's L layers where each token was predicted, if asked for.
    """

    log_p: Tensor
    log_ref: Tensor
    mask: Tensor
    divergence: Tensor | None = None
    scores: Tensor | None = None
    states: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log of policy by reference: float32 [2B, T], 0 outside the responses."""
        return torch.where(self.mask, self.log_p - self.log_ref, 0.0)


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a batch.

    Attributes:
        loss: float32 [B], with gradient.
        rewards: float32 [2B], implicit rewards of the responses, for logging.
        channels: by name float32 [2B, T], what the method decided at each token; without gradient.
        descriptions: of the channels, one sentence each.
        metrics: numbers to log.
    """

    loss: Tensor
    rewards: Tensor
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class PreferenceMethod(Protocol):
    """A loss over pairs. One with parameters of its own is also an `nn.Module`, and they are trained too."""

    needs: Needs

    def __call__(self, pairs: Pairs) -> Outcome: ...


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to the chosen and to the rejected responses, of [2B, ...]."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def required(values: Tensor | None, name: str) -> Tensor:
    """Raise `InputError` where a method was not given what it needs."""
    if values is None:
        raise InputError(f"pairs: the method needs `{name}`, and the batch has none; does `needs` ask for it?")
    return values


def check_positive(**numbers: float) -> None:
    """Raise `InputError` for a number that is not above 0."""
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name}: {value} is not a number above 0")


def check_not_negative(**numbers: float) -> None:
    """Raise `InputError` for a number below 0."""
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"{name}: {value} is not a number from 0 upwards")
