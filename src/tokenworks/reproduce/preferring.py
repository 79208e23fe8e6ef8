"""What the reproductions of preference methods share: a method trained and read, frontiers, words with a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenworks.align.contract import PreferenceMethod
from tokenworks.align.reading import Batch
from tokenworks.core.measure import Indices, Interval, bootstrap
from tokenworks.core.trace import Trace
from tokenworks.decode.adadec_threshold import auc
from tokenworks.reproduce.result import line
from tokenworks.reproduce.sentiment import Encoded, Sentiment
from tokenworks.reproduce.weighing import HeldOut, Seen

Score = Callable[[Batch], Tensor]
"""Gives the scores [2B, S - 1] of a batch."""

SHOWN = 7
"""The held-out pair of which a Trace is kept."""


# --- frontiers --------------------------------------------------------------------------------------------------


def gain(texts: HeldOut, seen: Sequence[Seen], items: Indices) -> float:
    """Mean reward of the policy less that of the reference."""
    return texts.mean(seen, "reward", items) - float(texts.rewards[items].mean())


def efficiency(texts: HeldOut, seen: Sequence[Seen], items: Indices) -> float:
    """Reward gained for each root of KL(reference || policy).

    Near the reference the gain is linear in how far the layers were moved and the divergence quadratic, so that
    this number says where a policy's frontier lies, and not how far along it the policy has gone.
    """
    return gain(texts, seen, items) / math.sqrt(texts.mean(seen, "reverse_kl", items))


def matched_divergence(texts: HeldOut, ours: Sequence[Seen], theirs: Sequence[Seen]) -> Interval:
    """Efficiency of ours by theirs; above 1, ours has the smaller divergence at equal reward."""
    return texts.over(
        lambda items, rows: (
            efficiency(texts, [ours[row] for row in rows], items)
            / efficiency(texts, [theirs[row] for row in rows], items)
        ),
        len(ours),
    )


def matched_entropy(texts: HeldOut, ours: Sequence[Seen], theirs: Sequence[Seen], reference: Seen) -> Interval:
    """Entropy of ours less that of theirs where their frontier, a line from the reference, has our reward."""

    def extra(items: Indices, rows: Indices) -> float:
        one, other = [ours[row] for row in rows], [theirs[row] for row in rows]
        begin = texts.mean([reference], "entropy", items)
        share = gain(texts, one, items) / gain(texts, other, items)
        line_of_theirs = begin + share * (texts.mean(other, "entropy", items) - begin)
        return texts.mean(one, "entropy", items) - line_of_theirs

    return texts.over(extra, len(ours))


def row(texts: HeldOut, name: str, seen: Sequence[Seen]) -> dict[str, Any]:
    """A row of a Result's table."""
    return {
        "method": name,
        "seeds": len(seen),
        "reward": str(texts.interval(seen, "reward")),
        "KL(reference || policy)": str(texts.interval(seen, "reverse_kl")),
        "KL(policy || reference)": str(texts.interval(seen, "kl")),
        "entropy, nats": str(texts.interval(seen, "entropy")),
        "|D_w - D_l| of pairs": str(texts.interval(seen, "gap")),
        "accuracy": str(texts.interval(seen, "accuracy")),
        "effective texts": round(float(np.mean([texts.effective(each) for each in seen]))),
    }


def frontier(texts: HeldOut, found: Mapping[str, Sequence[Sequence[Seen]]], title: str) -> dict[str, Any]:
    """A plot of reward against divergence: of each method a line from the reference through its settings."""
    start = [{name: [0.0] * texts.rewards.size for name in ("log_weight", "reverse_kl")}]
    lines = []
    for name, settings in found.items():
        points = sorted([start, *settings], key=lambda seen: texts.mean(seen, "reverse_kl"))
        at = [texts.mean(seen, "reverse_kl") for seen in points]
        lines.append(line(name, at, [texts.interval(seen, "reward") for seen in points]))
    return {
        "title": title,
        "x_label": "KL(reference || policy), nats a text",
        "y_label": "reward (VADER)",
        "lines": lines,
    }


# --- words with a value -----------------------------------------------------------------------------------------


def valences(bench: Sentiment, ids: Sequence[int]) -> list[float]:
    """VADER's value of the word that each token belongs to; 0 where there is none."""
    pieces = [str(bench.tokenizer.decode([token])) for token in ids]
    words: list[list[int]] = []
    for place, piece in enumerate(pieces):
        if place == 0 or piece[:1].isspace() or not piece[:1].isalpha():
            words.append([])
        words[-1].append(place)
    found = [0.0] * len(pieces)
    for places in words:
        value = bench.valence("".join(pieces[place] for place in places).strip(" .,;:!?\"'()"))
        for place in places:
            found[place] = value
    return found


def word_auc(
    scores: Sequence[Sequence[float]],
    positive: Sequence[Sequence[bool]],
    less: Sequence[Sequence[float]] | None = None,
) -> Interval:
    """The chance that a token of a positive word scores above another; resampling responses.

    Args:
        scores: of each response, one value a token; those of several seeds one after the other.
        positive: of each response, one value a token.
        less: other scores, whose chance is taken off.
    """
    sides = [[np.array(each, dtype=float) for each in side] for side in (scores, less) if side is not None]
    flags: list[NDArray[np.bool_]] = [np.array(each, dtype=bool) for each in positive]

    def chance(items: Indices) -> float:
        # A response comes with what every seed said of it.
        rows = [row for item in items for row in range(item, len(scores), len(flags))]
        right = np.concatenate([flags[row % len(flags)] for row in rows])
        first, *other = (auc(np.concatenate([side[row] for row in rows]), right) for side in sides)
        return first - sum(other)

    return bootstrap(chance, len(flags), draws=1000)


# --- batches ----------------------------------------------------------------------------------------------------


class Remembered:
    """A Score that is computed once for each response."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        keys = [
            ids[inside.bool()].numpy().tobytes()
            for ids, inside in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        if any(key not in self._kept for key in keys):
            found = self._score(batch)
            self._kept |= {key: row[inside] for key, row, inside in zip(keys, found, batch.mask, strict=True)}
        scores = torch.zeros(batch.mask.shape)
        for place, key in enumerate(keys):
            scores[place, batch.mask[place]] = self._kept[key]
        return scores


def shuffle(values: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Each row's tokens permuted among themselves: float [B, T]."""
    found = values.clone()
    for row, own in enumerate(mask):
        kept = values[row, own]
        found[row, own] = kept[torch.randperm(len(kept), generator=generator)]
    return found


def by_response(batch: Batch, values: Tensor) -> list[list[float]]:
    """Of [2B, S - 1] what belongs to each response's tokens."""
    return [row[inside].tolist() for row, inside in zip(values, batch.mask, strict=True)]


def trace(
    bench: Sentiment,
    policy: PreTrainedModel,
    method: PreferenceMethod,
    pair: Encoded,
    title: str,
    score: Score | None = None,
) -> dict[str, Any]:
    """Both responses of a pair, chosen first, with the method's channels."""
    batch = bench.collate([pair])
    if score is not None:
        batch = replace(batch, scores=score(batch))
    if isinstance(method, nn.Module):
        method.eval()
    with torch.no_grad():
        outcome = method(bench.read(policy, batch, method.needs))
    ids = pair.pair.chosen + pair.pair.rejected
    found = Trace.from_ids(ids, bench.tokenizer)
    sides = ["chosen"] * len(pair.pair.chosen) + ["rejected"] * len(pair.pair.rejected)
    found.add("response", sides, "the preferred one stands first")
    for name, values in outcome.channels.items():
        numbers = [number for row in by_response(batch, values) for number in row]
        found.add(name, numbers, outcome.descriptions.get(name, ""))
    found.meta |= {
        "title": f"{title}: {bench.tokenizer.decode(pair.pair.prompt)}",
        "loss": float(outcome.loss.sum()),
    }
    return found.to_dict()
