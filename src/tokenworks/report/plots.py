"""The report's plots, written by hand as SVG: they take the page's colours, light or dark, and need no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tokenworks.core.trace_html import escape
from tokenworks.reproduce.result import Figure

LINES = 6
"""How many lines look different: each has a colour, a dash pattern and a marker of its own (style.py has them)."""

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 26, 190

Point = tuple[float, float]


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent for everyday sizes; anything else as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | str | int) or not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if 1e-4 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}".replace("-", "−")
    return "0" if value == 0 else f"{value:.{digits - 1}e}".replace("-", "−")


def interval_plot(figure: Figure) -> str:
    """The interval as a bar with its value as a dot, and the threshold to confirm the claim as a dashed line."""
    low, high = figure.interval
    marks = [v for v in (low, high, figure.value, figure.confirm_at, figure.refute_below) if math.isfinite(v)]
    least, most = min(marks), max(marks)
    margin = (most - least) * 0.1 or abs(most) * 0.1 or 1.0
    least, most = least - margin, most + margin

    def x(value: float) -> float:
        inside = least if math.isnan(value) else min(max(value, least), most)
        return round(4 + 132 * (inside - least) / (most - least), 1)

    words = (
        f"{number(figure.value)}, 95% interval {number(low)} to {number(high)}; to confirm {figure.confirm_at:g}"
    )
    start, end, threshold = x(low), x(high), x(figure.confirm_at)
    return (
        f'<svg class="interval" viewBox="0 0 140 24" role="img" aria-label="{escape(words)}">'
        f'<path class="axis" d="M4 12H136"/>'
        f'<path class="threshold" d="M{threshold} 1V23"/>'
        f'<path class="bar" d="M{start} 12H{end}M{start} 8V16M{end} 8V16"/>'
        f'<circle class="dot" cx="{x(figure.value)}" cy="12" r="3.5"/></svg>'
    )


def line_chart(series: dict[str, Any]) -> str:
    """One of a Result's `series`: lines with their bands, axes with ticks, and a legend that wraps."""
    lines = [_Line(place, line) for place, line in enumerate(series["lines"])]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in [*line.points, *line.low, *line.high]]
    title, x_label, y_label = (escape(str(series.get(key, ""))) for key in ("title", "x_label", "y_label"))
    if not xs:
        return f'<figure class="chart"><figcaption>{title}</figcaption><p>No finite values to plot.</p></figure>'
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 6), _ticks(min(ys), max(ys), 5)
    across = _Scale(min(xs), max(xs), _LEFT + 6, _RIGHT - 6)
    # The vertical axis ends at ticks; the horizontal one at the data, which would look cut short otherwise.
    up = _Scale(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), _BOTTOM, _TOP)
    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {up(y)}H{_RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{up(y)}" dy=".35em" text-anchor="end">{_tick(y, y_ticks)}</text>'
        for y in y_ticks
    ) + "".join(
        f'<path class="axis" d="M{across(x)} {_BOTTOM}v4"/>'
        f'<text x="{across(x)}" y="{_BOTTOM + 16}" text-anchor="middle">{_tick(x, x_ticks)}</text>'
        for x in x_ticks
        if min(xs) <= x <= max(xs)
    )
    drawn = "".join([line.band(across, up) for line in lines] + [line.draw(across, up) for line in lines])
    legend = "".join(f"<li>{line.key()}{escape(line.name)}</li>" for line in lines)
    return (
        f'<figure class="chart"><figcaption>{title}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}: {y_label} by {x_label}">'
        f'{grid}<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>'
        f'<text x="2" y="12">{y_label}</text>'
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{x_label}</text>'
        f"{drawn}</svg>"
        f'<ul class="key">{legend}</ul></figure>'
    )


class _Scale:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


class _Line:
    """A line of a chart; a missing or infinite value leaves a gap."""

    def __init__(self, place: int, line: dict[str, Any]) -> None:
        self.name = str(line.get("name", ""))
        self.style = f"line{place % LINES}"
        xs = line["x"]
        self.runs = _runs(xs, line["y"])
        self.points = [point for run in self.runs for point in run]
        banded = line.get("low") is not None and line.get("high") is not None
        self.low, self.high = ([], []) if not banded else (_finite(xs, line["low"]), _finite(xs, line["high"]))

    def band(self, across: _Scale, up: _Scale) -> str:
        if not self.low:
            return ""
        outline = " ".join(f"{across(x)},{up(y)}" for x, y in [*self.high, *reversed(self.low)])
        return f'<polygon class="band {self.style}" points="{outline}"/>'

    def draw(self, across: _Scale, up: _Scale) -> str:
        drawn = "".join("M" + "L".join(f"{across(x)} {up(y)}" for x, y in run) for run in self.runs)
        # Many markers would hide the line; a run of one point would be invisible without.
        shown = self.points if len(self.points) <= 30 else [run[0] for run in self.runs if len(run) == 1]
        dots = "".join(f'<circle cx="{across(x)}" cy="{up(y)}" r="2.2"/>' for x, y in shown)
        return f'<g class="{self.style}"><path d="{drawn}"/>{dots}</g>'

    def key(self) -> str:
        return f'<svg viewBox="0 0 30 10" aria-hidden="true"><g class="{self.style}"><path d="M1 5H29"/></g></svg>'


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(xs: Sequence[Any], ys: Sequence[Any]) -> list[Point]:
    return [(x, y) for x, y in zip(xs, ys, strict=True) if _is_finite(x) and _is_finite(y)]


def _runs(xs: Sequence[Any], ys: Sequence[Any]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if _is_finite(x) and _is_finite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers, from the last at or below `low` to the first at or above `high`."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [step * place for place in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _tick(value: float, ticks: Iterable[float]) -> str:
    """All ticks of an axis with the same number of decimals."""
    first, second, *_ = ticks
    decimals = max(0, -math.floor(math.log10(second - first) + 1e-9))
    if abs(value) >= 1e6 or decimals > 4:
        return f"{value:.3g}"
    return f"{value:.{decimals}f}".replace("-", "−")
