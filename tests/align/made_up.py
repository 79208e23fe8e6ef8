"""Random pairs in double precision, as a method gets them, for the tests of losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenworks.align.contract import Pairs, PreferenceMethod

LAYERS, WIDTH, VOCABULARY = 3, 5, 7


def random_pairs(seed: int = 0, pairs: int = 3, tokens: int = 6, equal: bool = False) -> Pairs:
    """Pairs whose every number is a leaf where a gradient makes sense; `equal` for a policy that is its reference.

    Divergences stand for themselves here: they do not belong to the log-probabilities.
    """
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64)

    rows = 2 * pairs
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, length in enumerate(torch.randint(2, tokens, (rows,), generator=random).tolist()):
        begin = int(torch.randint(0, tokens - length + 1, (1,), generator=random))
        mask[row, begin : begin + length] = True
    log_ref = -3 * numbers(rows, tokens) * mask
    log_p = log_ref.clone() if equal else (log_ref + (numbers(rows, tokens) - 0.5)) * mask
    divergence = torch.zeros(rows, tokens, dtype=torch.float64) if equal else numbers(rows, tokens) * mask
    return Pairs(
        log_p.requires_grad_(True),
        log_ref,
        mask,
        divergence.requires_grad_(True),
        (numbers(rows, tokens) - 0.5) * mask,
        numbers(rows, tokens, LAYERS, WIDTH) - 0.5,
    )


def swapped(pairs: Pairs) -> Pairs:
    """Rejected responses for chosen ones."""

    def turned(values: Tensor | None) -> Any:
        return None if values is None else torch.cat(values.chunk(2)[::-1])

    return Pairs(*(turned(getattr(pairs, name)) for name in Pairs.__dataclass_fields__))


def widened(pairs: Pairs, left: int, right: int) -> Pairs:
    """More padding on both sides."""

    def wider(values: Tensor) -> Tensor:
        size = list(values.shape)
        fill = [values.new_zeros([size[0], width, *size[2:]]) for width in (left, right)]
        return torch.cat([fill[0], values, fill[1]], 1)

    return replace(pairs, **{name: wider(getattr(pairs, name)) for name in Pairs.__dataclass_fields__})


def loss_and_gradients(method: PreferenceMethod, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum to response tokens' `log_p` and `divergence` (0 without one)."""
    assert pairs.divergence is not None
    loss = method(pairs).loss
    leaves = (pairs.log_p, pairs.divergence)
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    to_log_p, to_divergence = (gradient * pairs.mask for gradient in found)
    return loss.detach(), to_log_p, to_divergence
