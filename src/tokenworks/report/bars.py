"""A plot of decoders against plain decoding, as a file for a paper or a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.decode.grid import GridRow

FORMATS = (".png", ".svg", ".pdf")


def save_grid(rows: Sequence[GridRow], path: Path, title: str) -> None:
    """Draw each pair's speed against plain decoding with its interval, fastest on top.

    Raises:
        InputError: the file's ending is none of `FORMATS`.
    """
    check_format(path)
    figure = Figure(figsize=(7.5, 1.4 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        found, colour = row.times_plain, "#1f6f78" if row.times_plain.low > 1 else "#8a8a8a"
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        axes.plot(found.value, place, "o", color=colour)
        axes.annotate(
            f"{row.tokens_per_pass.value:.2f} tokens a pass",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color="#555555",
        )
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_yticks(list(places), [f"{row.draft} + {row.verify}" for row in rows], fontsize=8)
    axes.set_xlabel("times the speed of plain decoding (95% interval over prompts)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    with atomic_write(path, "wb") as out:
        out.write(drawn.getvalue())


def check_format(path: Path) -> None:
    """Raise `InputError` if a plot cannot be written as this kind of file."""
    if path.suffix not in FORMATS:
        raise InputError(f"plot: {path} must end in {', '.join(FORMATS)}")
