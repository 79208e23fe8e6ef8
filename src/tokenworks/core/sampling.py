"""Sampling: how a row of logits becomes the distribution that the next token is drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenworks.core.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, in the order Hugging Face applies them.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens (and any tied with the last of them); None keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least p; None keeps all.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: {self.temperature} is not a number from 0 upwards")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: {self.top_k} is not at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} is not in (0, 1]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def distribution(self, logits: Tensor) -> Tensor:
        """The normalised distribution that tokens are drawn from.

        Args:
            logits: float [..., V].

        Returns:
            float32 [..., V], each row summing to 1; one-hot at the first largest logit when greedy.
        """
        if self.greedy:
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        scaled = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            floor = scaled.topk(self.top_k, dim=-1).values[..., -1:]
            scaled = scaled.masked_fill(scaled < floor, -torch.inf)
        probabilities = torch.softmax(scaled, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            # A token stays if the tokens before it do not yet reach top_p; the first always stays.
            dropped = ordered.cumsum(-1) - ordered >= self.top_p
            kept = ordered.masked_fill(dropped, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
            probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> int:
        """One token from logits [V]: the argmax when greedy, else a draw from `distribution`."""
        if self.greedy:
            return int(logits.argmax())
        return int(torch.multinomial(self.distribution(logits), 1, generator=generator))


def top_ids(logits: Tensor, k: int) -> Tensor:
    """The k largest logits' ids, largest first: int64 [N, k] from float [N, V].

    Looks first for the k blocks of 64 with the largest maxima, which must hold the k largest entries: several
    times as fast as `torch.topk` over a whole vocabulary.
    """
    rows, vocabulary = logits.shape
    block = 64
    if vocabulary % block or vocabulary < 2 * k * block:
        return logits.topk(k, dim=-1).indices
    blocks = logits.view(rows, -1, block)
    chosen = blocks.amax(-1).topk(k, dim=-1).indices
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, block)).view(rows, -1)
    best = inside.topk(k, dim=-1).indices
    return chosen.gather(1, best // block) * block + best % block
