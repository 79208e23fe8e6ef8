"""Many continuations of many prefixes, in batches, each prefix read once.

    texts = sample_continuations(model, prefixes, n=64, max_new_tokens=40, sampling=Sampling(1.0), stop_ids=stops)
    texts[3]                  # 64 continuations of the fourth prefix, as ids

Rollouts are dear by their number: the cache of a prefix is copied and not computed again for its continuations,
and those that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenworks.core.architectures import cache_argument
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling

ROWS = 512
"""Texts that are continued side by side."""


@torch.inference_mode()
def sample_continuations(
    model: PreTrainedModel,
    prefixes: Sequence[Sequence[int]],
    n: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Iterable[int],
    seed: int | None = None,
) -> list[list[list[int]]]:
    """For each prefix `n` continuations, each up to and including its stop token.

    Args:
        prefixes: at least one token each; of one length is fastest.
        n: at least 1.
        seed: of the draws; None takes PyTorch's own state.

    Raises:
        InputError: an empty prefix, or a number out of range.
    """
    if n < 1 or max_new_tokens < 1:
        raise InputError(f"n, max_new_tokens: {n} and {max_new_tokens} must be at least 1")
    if not all(prefixes):
        raise InputError("prefixes: an empty one; each needs at least one token")
    generator = torch.Generator(model.device)
    generator.manual_seed(torch.seed() if seed is None else seed)
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=model.device)
    order = sorted(range(len(prefixes)), key=lambda place: len(prefixes[place]))
    found: list[list[list[int]]] = [[] for _ in prefixes]
    at_once = max(1, ROWS // n)
    for start in range(0, len(order), at_once):
        places = order[start : start + at_once]
        written = _continue(model, [prefixes[p] for p in places], n, max_new_tokens, sampling, stops, generator)
        for row, place in enumerate(places):
            found[place] = written[row * n : (row + 1) * n]
    return found


def _continue(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    n: int,
    max_new_tokens: int,
    sampling: Sampling,
    stops: Tensor,
    generator: torch.Generator,
) -> list[list[int]]:
    width = max(map(len, prefixes))
    padding = [width - len(prefix) for prefix in prefixes]
    ids = torch.tensor(
        [[0] * pad + list(p) for pad, p in zip(padding, prefixes, strict=True)], device=model.device
    )
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=model.device)
    cache, name = DynamicCache(config=model.config), cache_argument(model)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True,
        logits_to_keep=1, **{name: cache},
    ).logits[:, -1]  # fmt: skip
    cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    texts: list[list[int]] = [[] for _ in range(len(mask))]
    alive = torch.arange(len(texts), device=model.device)
    for length in range(1, max_new_tokens + 1):
        drawn = _draw(logits, sampling, generator)
        for place, token in zip(alive.tolist(), drawn.tolist(), strict=True):
            texts[place].append(token)
        going = ~torch.isin(drawn, stops)
        if length == max_new_tokens or not going.any():
            break
        if not going.all():
            rows = going.nonzero()[:, 0]
            cache.batch_select_indices(rows)
            alive, mask, drawn = alive[rows], mask[rows], drawn[rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=drawn[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
            use_cache=True, **{name: cache},
        ).logits[:, -1]  # fmt: skip
    return texts


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row [N, V]."""
    if sampling.greedy:
        return logits.argmax(-1)
    return torch.multinomial(sampling.distribution(logits), 1, generator=generator)[:, 0]
