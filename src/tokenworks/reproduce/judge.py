"""Reading a text with a model: what it thought at each place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenworks.core.session import Engine


def read_logits(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """After each of the tokens, read as a new text: float [n, V]."""
    parts: list[Tensor] = []
    engine.rollback(0)
    engine.prefill(tokens, lambda _, logits: parts.append(logits))
    return torch.cat(parts)


def log_probs(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """Of each token given those before it, from the second on, in nats: float [n - 1]."""
    rows = torch.log_softmax(read_logits(engine, tokens)[:-1], -1)
    return rows[torch.arange(len(rows)), torch.tensor(tokens[1:])]
