"""How every claim is measured: paired timing, bootstrap intervals, and goodness of fit (from `core.fit`).

Two habits keep the figures honest: candidates are timed on the same items in alternating order, and intervals
resample items, because a claim is about the next prompt and not about the next run of the same prompt.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from tokenworks.core.errors import InputError
from tokenworks.core.fit import FitTest, goodness_of_fit
from tokenworks.core.native import native_name

__all__ = [
    "FitTest",
    "Interval",
    "PairedRuns",
    "auc",
    "bootstrap",
    "goodness_of_fit",
    "machine_facts",
    "mean_interval",
    "paired",
    "ratio_of_sums",
]

Item = TypeVar("Item")
T = TypeVar("T")
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

DRAWS = 2000
"""Bootstrap resamples: between seeds the ends of a 95% interval then move by 1 or 2% of its width."""


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval, all in the unit of the quantity estimated.

    Args:
        value: the estimate on all items.
        low: the lower end of the interval.
        high: the upper end.
        level: the confidence level, in (0, 1).
    """

    value: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        largest = max(abs(self.value), abs(self.low), abs(self.high))
        decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 2
        return f"{self.value:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def bootstrap(
    statistic: Callable[[Indices], float], n_items: int, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap over items (Efron 1979).

    With few items the interval is too narrow: at level 0.95 it covers about 0.90 with 10 items and 0.85 with 5,
    and less if the values are skewed.

    Args:
        statistic: takes int64 item numbers [n_items], repeats allowed, and returns the quantity on those items.
        n_items: how many items there are, at least 2: one item says nothing about how items vary.
        draws: how many resamples, at least 1.
        level: confidence level, in (0, 1).
        seed: of the resampling; equal seeds resample the same items, which pairs two calls.

    Raises:
        InputError: a value out of range, or the statistic is not finite on the items or on a resample of them.
    """
    if n_items < 2:
        raise InputError(f"n_items: an interval needs at least 2 items, got {n_items}; measure more items")
    if draws < 1:
        raise InputError(f"draws: {draws} is not at least 1")
    if not 0 < level < 1:
        raise InputError(f"level: {level} is not between 0 and 1; 0.95 is usual")
    rng = np.random.default_rng(seed)
    value = float(statistic(np.arange(n_items)))
    resampled = [float(statistic(rng.integers(n_items, size=n_items))) for _ in range(draws)]
    if not np.isfinite([value, *resampled]).all():
        raise InputError("statistic: it is not finite on some resample; are most items zero or missing?")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def mean_interval(values: ArrayLike, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of `values` [n], one per item, with its bootstrap interval.

    Raises:
        InputError: fewer than 2 values, a value that is not finite, or as `bootstrap`.
    """
    numbers = _per_item(values, "values")
    return bootstrap(lambda items: numbers[items].mean(), len(numbers), draws=draws, level=level, seed=seed)


def ratio_of_sums(
    numerators: ArrayLike, denominators: ArrayLike, *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """Sum over sum, such as tokens per forward pass, with its bootstrap interval.

    The sums are taken over the resampled items, so long items weigh more than short ones, as they do for a user.

    Args:
        numerators: [n], one per item.
        denominators: [n], in the same order, none negative and not all zero.

    Raises:
        InputError: unequal lengths, fewer than 2 items, a value that is not finite, or as `bootstrap`.
    """
    above = _per_item(numerators, "numerators")
    below = _per_item(denominators, "denominators", len(above))
    if below.min() < 0 or not below.any():
        raise InputError("denominators: they must not be negative, nor all zero")

    def ratio(items: Indices) -> float:
        total = float(below[items].sum())
        return float(above[items].sum()) / total if total else math.nan

    return bootstrap(ratio, len(above), draws=draws, level=level, seed=seed)


@dataclass(frozen=True)
class PairedRuns(Generic[T]):
    """What `paired` kept.

    Args:
        seconds: for each candidate and item the wall-clock seconds of each repeat: `seconds[name][item][repeat]`.
        outputs: for each candidate and item what the first repeat returned: `outputs[name][item]`.
    """

    seconds: dict[str, list[list[float]]]
    outputs: dict[str, list[T]]

    def median_seconds(self, name: str) -> list[float]:
        """For each item the median over repeats, in seconds.

        Raises:
            InputError: no candidate has this name.
        """
        if name not in self.seconds:
            raise InputError(f"name: no candidate {name!r}; there are {', '.join(self.seconds)}")
        return [float(np.median(repeats)) for repeats in self.seconds[name]]

    def ratio(
        self,
        name: str,
        baseline: str,
        work: Mapping[str, Sequence[float]] | None = None,
        level: float = 0.95,
        seed: int = 0,
    ) -> Interval:
        """How many times as fast `name` is as `baseline`: total work over total median seconds, one by the other.

        Every bootstrap resample takes the same items for both, so what makes an item slow for both cancels.

        Args:
            work: for each of the two the work done on each item, usually tokens generated; default 1 per item.

        Raises:
            InputError: an unknown name, fewer than 2 items, work that is missing, negative, all zero or not
                finite, or of the wrong length, or as `bootstrap`.
        """
        ours, theirs = (np.array(self.median_seconds(candidate)) for candidate in (name, baseline))
        ours_work, theirs_work = (self._work(candidate, work, len(ours)) for candidate in (name, baseline))

        def ratio(items: Indices) -> float:
            below = ours[items].sum() * theirs_work[items].sum()
            return float(ours_work[items].sum() * theirs[items].sum() / below) if below else math.nan

        return bootstrap(ratio, len(ours), level=level, seed=seed)

    def _work(self, name: str, work: Mapping[str, Sequence[float]] | None, n_items: int) -> Floats:
        if work is None:
            return np.ones(n_items)
        if name not in work:
            raise InputError(f"work: it has no entry for {name!r}; give one number per item")
        done = _per_item(work[name], f"work[{name!r}]", n_items)
        if done.min() < 0 or not done.any():
            raise InputError(f"work[{name!r}]: it must not be negative, nor all zero")
        return done


def paired(
    runs: Mapping[str, Callable[[Item], T]],
    items: Sequence[Item],
    *,
    repeats: int = 1,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PairedRuns[T]:
    """Time each candidate on each item, in an order that turns from item to item and from repeat to repeat.

    Over any 2n turns of n candidates each stands in each place twice and goes as often before another as after
    it, so a slow drift of the machine or a cache left warm by the one before hits all alike.

    Args:
        runs: the candidates by name. Each takes an item and returns when its work is done (on a GPU that means
            after synchronising).
        items: what to run them on, usually prompts. All items are run once before any is repeated.
        repeats: timed runs of each candidate on each item, at least 1.
        warmup: untimed runs of each candidate on the first item beforehand, at least 0.
        progress: called after each timed run with the runs done and the runs in all.

    Raises:
        InputError: no candidates, no items, or a number out of range.
    """
    if not runs:
        raise InputError("runs: empty; give at least one candidate")
    if len(items) == 0:
        raise InputError("items: empty; give at least one item")
    if repeats < 1:
        raise InputError(f"repeats: {repeats} is not at least 1")
    if warmup < 0:
        raise InputError(f"warmup: {warmup} is negative")
    for _ in range(warmup):
        for run in runs.values():
            run(items[0])
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in items] for name in runs}
    outputs: dict[str, list[T]] = {name: [] for name in runs}
    done, total = 0, repeats * len(items) * len(runs)
    for repeat in range(repeats):
        for number, item in enumerate(items):
            for name in _turn(list(runs), number + repeat):
                start = time.perf_counter()
                output = runs[name](item)
                seconds[name][number].append(time.perf_counter() - start)
                if repeat == 0:
                    outputs[name].append(output)
                done += 1
                if progress is not None:
                    progress(done, total)
    return PairedRuns(seconds, outputs)


def _turn(names: list[str], turn: int) -> list[str]:
    """The n rotations of `names` one after the other, then the same reversed: AB BA BA AB for two."""
    cycle, shift = divmod(turn, len(names))
    order = names[shift:] + names[:shift]
    return order[::-1] if cycle % 2 else order


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """The chance that a positive scores above a negative, ties counting half (the area under the ROC curve).

    Args:
        scores: [n] numbers; positive: [n] truth values.

    Raises:
        InputError: unequal lengths, or one of the two kinds is missing.
    """
    numbers, chosen = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    count = int(chosen.sum())
    if numbers.shape != chosen.shape or not 0 < count < len(numbers):
        raise InputError(f"positive: {count} of {chosen.size} for {numbers.size} scores; both kinds are needed")
    ranks = rankdata(numbers)
    return float((ranks[chosen].sum() - count * (count + 1) / 2) / (count * (len(numbers) - count)))


def machine_facts() -> dict[str, str | int]:
    """What a timing depends on: cpu, cores (torch threads), versions, what multiplies; nothing that names a
    user or a host."""
    return {
        "cpu": _cpu_model(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "linear layers": native_name() or "oneDNN",
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    """The processor's name where Linux gives it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def bootstrap_with_seeds(
    statistic: Callable[[Indices, Indices], float], n_items: int, n_seeds: int, *, draws: int = DRAWS
) -> Interval:
    """`bootstrap` over items and, in the same resample, over the seeds that measured them.

    Args:
        statistic: takes int64 item numbers [n_items] and seed numbers [n_seeds], repeats allowed; the estimate is
            of every item and seed once.
        n_items, draws: see `bootstrap`.
        n_seeds: at least 1.

    Raises:
        InputError: see `bootstrap`.
    """
    rng, every = np.random.default_rng(0), np.arange(n_items)

    def resampled(items: Indices) -> float:
        # The first call is the estimate itself.
        whole = np.array_equal(items, every)
        return statistic(items, np.arange(n_seeds) if whole else rng.integers(n_seeds, size=n_seeds))

    return bootstrap(resampled, n_items, draws=draws)


def _per_item(values: ArrayLike, name: str, length: int | None = None) -> Floats:
    """`values` as float64 [n], n >= 2 and equal to `length` if given, all finite; else an InputError on `name`."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected one number per item ({error})") from error
    if numbers.ndim != 1 or len(numbers) < 2:
        raise InputError(f"{name}: expected one number for each of at least 2 items, got {list(numbers.shape)}")
    if length is not None and len(numbers) != length:
        raise InputError(f"{name}: {len(numbers)} numbers for {length} items")
    if not np.isfinite(numbers).all():
        raise InputError(f"{name}: item {int(np.argmin(np.isfinite(numbers)))} is not finite; leave it out")
    return numbers
