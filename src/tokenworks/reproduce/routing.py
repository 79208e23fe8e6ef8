"""What routed generations are worth: quality at equal shares of the large model's tokens.

Prompts are the independent units of all intervals; the seeds of a prompt are summed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokenworks.core.measure import Indices, Interval, PairedRuns, bootstrap

Statistic = Callable[[Indices], float]
"""A quantity on resampled prompts."""


class Found:
    """What every way wrote on every prompt: "small" and "large" alone, and "KIND POINT" for each kind of router.

    Args:
        points: names of the thresholds, the same for each kind.

    Counts of a way on a prompt: "nats" under the large model, "words" (tokens), those "routed", those the large
    model "read", "seconds"; and, filled in at the end, "common" (tokens of the longest common subsequence with
    what the large model alone wrote), "lengths" (half of both lengths), "pairs" of neighbouring tokens, and
    "distinct" ones. A name without its seed, such as "random 0.5", stands for all seeds.
    """

    def __init__(self, points: Sequence[str]) -> None:
        self.points = points
        self._pieces: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, piece: dict[str, Any]) -> None:
        self._pieces.setdefault(name, []).append(piece)

    def counts(self, name: str, what: str) -> Any:
        """float64 [prompts], summed over seeds."""
        same = [n for n in self._pieces if n == name or n.startswith(f"{name} #")]
        return np.sum([[self._count(n, p, what) for p in range(self.prompts)] for n in same], axis=0)

    @property
    def prompts(self) -> int:
        return len(self._pieces["large"])

    def _count(self, name: str, prompt: int, what: str) -> float:
        piece = self._pieces[name][prompt]
        if what in piece["counts"]:
            return float(piece["counts"][what])
        ids, target = piece["token_ids"], self._pieces["large"][prompt]["token_ids"]
        pairs = list(itertools.pairwise(ids))
        return {
            "common": common(ids, target),
            "lengths": (len(ids) + len(target)) / 2,
            "pairs": len(pairs),
            "distinct": len(set(pairs)),
        }[what]

    def ratio(self, name: str, above: str, below: str) -> Statistic:
        """Sum over sum, on resampled prompts."""
        one, other = self.counts(name, above), self.counts(name, below)
        return lambda items: float(one[items].sum() / other[items].sum())

    def nats(self, name: str) -> Statistic:
        return self.ratio(name, "nats", "words")

    def share(self, name: str) -> Statistic:
        return self.ratio(name, "routed", "words")

    def overlap(self, name: str) -> Statistic:
        """F-measure of the longest common subsequence with the large model's own answer (ROUGE-L, of tokens)."""
        return self.ratio(name, "common", "lengths")

    def interval(self, statistic: Statistic) -> Interval:
        """Over prompts; equal resamples for all statistics, which pairs them."""
        return bootstrap(statistic, self.prompts)

    def recovered(self, name: str) -> Statistic:
        """Which part of the way from the small model's nats to the large one's."""
        small, large, ours = (self.nats(each) for each in ("small", "large", name))
        return lambda items: (small(items) - ours(items)) / (small(items) - large(items))

    def along(self, kind: str, share: Statistic, quality: Callable[[str], Statistic]) -> Statistic:
        """The quality of a kind of router at some share, on straight lines between its points, the small model
        alone at 0 and the large one at 1."""
        names = ("small", *(f"{kind} {point}" for point in self.points), "large")
        curve = [(self.share(name), quality(name)) for name in names]

        def at(items: Indices) -> float:
            places = sorted((x(items), y(items)) for x, y in curve)
            return float(np.interp(share(items), [x for x, _ in places], [y for _, y in places]))

        return at

    def rival(self, kind: str, point: str, quality: Callable[[str], Statistic]) -> Statistic:
        """The quality of another kind of router at the share that R2R has at `point`."""
        return self.along(kind, self.share(f"R2R {point}"), quality)

    def ahead(self, kind: str, quality: Callable[[str], Statistic]) -> Interval:
        """How far R2R is ahead of another kind of router at equal shares; the mean over all points."""
        pairs = [(quality(f"R2R {point}"), self.rival(kind, point, quality)) for point in self.points]
        return self.interval(lambda items: float(np.mean([ours(items) - theirs(items) for ours, theirs in pairs])))

    def speed(self, name: str) -> Interval:
        """Tokens a second, by those of the large model alone."""
        names = (name, "large")
        seconds = {each: [[s] for s in self.counts(each, "seconds")] for each in names}
        return PairedRuns[None](seconds, {}).ratio(name, "large", {n: self.counts(n, "words") for n in names})


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        new = [0]
        for place, wanted in enumerate(other):
            new.append(row[place] + 1 if token == wanted else max(row[place + 1], new[place]))
        row = new
    return row[-1]
