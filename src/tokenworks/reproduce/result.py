"""Result: what a reproduction measured, and the verdict that follows from it.

A verdict is computed from an interval and two thresholds that the paper's claim fixes before the run; nobody
types one in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenworks.core.files import atomic_write
from tokenworks.core.measure import Interval

CONFIRMED = "confirmed"
NOT_CONFIRMED = "not confirmed at this scale"
REFUTED = "refuted at this scale"


@dataclass
class Figure:
    """One measured quantity of a claim, ours against a baseline in the same run.

    `interval` is a 95% interval for `value`, the quantity the claim is about: a ratio of ours to the baseline,
    or an absolute number such as mean accepted tokens. Larger is better. The claim holds if the whole interval
    lies at or above `confirm_at`; it is refuted if the whole interval lies below `refute_below`.
    """

    name: str
    unit: str
    value: float
    interval: tuple[float, float]
    confirm_at: float
    refute_below: float
    ours: float
    baseline: float | None = None
    baseline_name: str = ""
    paper: str = ""
    """The paper's own figure for this quantity, in words ("2.70 on Vicuna-7B, SpecBench")."""
    headline: bool = False
    """Whether the paper's main claim rests on this figure: the Result's verdict is over the headline ones."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not low <= high:
            raise ValueError(f"interval: low end {low} above high end {high} in figure {self.name!r}")
        if self.refute_below > self.confirm_at:
            raise ValueError(f"refute_below {self.refute_below} above confirm_at {self.confirm_at}")
        self.interval = (float(low), float(high))

    @property
    def verdict(self) -> str:
        low, high = self.interval
        if low >= self.confirm_at:
            return CONFIRMED
        return REFUTED if high < self.refute_below else NOT_CONFIRMED


def figure(
    name: str, unit: str, found: Interval, confirm_at: float, refute_below: float, ours: float, **about: Any
) -> Figure:
    """A Figure from an Interval."""
    return Figure(name, unit, found.value, (found.low, found.high), confirm_at, refute_below, ours, **about)


def exact(value: float) -> Interval:
    """Of a quantity that was counted, not estimated."""
    return Interval(value, value, value, 0.95)


def line(name: str, x: Iterable[float], found: Sequence[Interval]) -> dict[str, Any]:
    """A line of a plot, with its intervals."""
    return {
        "name": name,
        "x": list(x),
        "y": [each.value for each in found],
        "low": [each.low for each in found],
        "high": [each.high for each in found],
    }


@dataclass
class Result:
    """Everything one reproduction measured, self-contained and kept as JSON."""

    slug: str
    claim: str
    figures: list[Figure]
    seeds: list[int]
    seconds: float
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    table: list[dict[str, Any]] = field(default_factory=list)
    """Supporting rows, all with the same keys (one per method or prompt kind, say)."""
    series: list[dict[str, Any]] = field(default_factory=list)
    """Plots: each {title, x_label, y_label, lines: [{name, x: [...], y: [...], low?: [...], high?: [...]}]}."""
    traces: list[dict[str, Any]] = field(default_factory=list)
    """Traces worth looking at, as `Trace.to_dict()` gives them, each with a "title" in its meta."""
    notes: list[str] = field(default_factory=list)
    created: str = ""

    @property
    def verdict(self) -> str:
        """Confirmed if every headline figure is; refuted if any headline figure is; else not confirmed."""
        verdicts = [f.verdict for f in self.figures if f.headline]
        if not verdicts:
            raise ValueError(f"figures: the Result for {self.slug} has no headline figure")
        if all(v == CONFIRMED for v in verdicts):
            return CONFIRMED
        return REFUTED if REFUTED in verdicts else NOT_CONFIRMED

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for kept, figure in zip(data["figures"], self.figures, strict=True):
            kept["verdict"] = figure.verdict
        return {"verdict": self.verdict, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        data = {k: v for k, v in data.items() if k != "verdict"}
        data["figures"] = [Figure(**{k: v for k, v in f.items() if k != "verdict"}) for f in data["figures"]]
        return cls(**data)

    def save(self, path: Path) -> None:
        """Write as JSON: to a temporary file beside `path`, then renamed, so a reader never sees half of it."""
        with atomic_write(path) as out:
            json.dump(self.to_dict(), out, indent=1)

    @classmethod
    def load(cls, path: Path) -> Result:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
