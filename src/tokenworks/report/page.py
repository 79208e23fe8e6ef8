"""All Results as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.trace import Trace
from tokenworks.core.trace_html import POLICY, TRACE_CSS, TRACE_JS, escape, trace_fragment
from tokenworks.report.plots import interval_plot, line_chart, number
from tokenworks.report.style import CSS
from tokenworks.reproduce.result import CONFIRMED, NOT_CONFIRMED, REFUTED, Figure, Result

_BADGES = {CONFIRMED: ("yes", "✓"), NOT_CONFIRMED: ("open", "○"), REFUTED: ("no", "✗")}

_HOW = f"""<div class="how"><h2>How to read this</h2>
<p>Each paper's <b>claim</b> is measured again, against a baseline in the same run. The <b>interval</b> holds the
true value with 95% confidence, and the thresholds were fixed before the run:</p>
<ul><li>✓ <b>{CONFIRMED}</b>: the whole interval lies at or above the threshold to confirm
(the dashed line in the plots).</li>
<li>✗ <b>{REFUTED}</b>: the whole interval lies below the threshold to refute.</li>
<li>○ <b>{NOT_CONFIRMED}</b>: anything else; a larger run may decide it.</li></ul>
<p>A paper's verdict is over its headline figures: confirmed if all of them are, refuted if one is. Runs marked
<span class="badge">quick</span> used a small sample.</p></div>"""

_EMPTY = """<p>There are no Results yet. Make one, in a few minutes, and write this page again:</p>
<p class="scroll"><code>tokenworks reproduce token-recycling --quick</code></p>
<p class="scroll"><code>tokenworks report</code></p>"""


def render(
    results: Sequence[Result], unreadable: Iterable[str] = (), title: str = "Papers, measured again"
) -> str:
    """The page.

    Args:
        results: in the order of their sections.
        unreadable: names of files that should have held Results; the page lists them.
    """
    anchors = _anchors(results)
    sections = "".join(_section(*named) for named in zip(results, anchors, strict=True))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{POLICY}
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}
{TRACE_CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_damage(unreadable)}
{_HOW + _summary(results, anchors) if results else _EMPTY}
{sections}
<script>{TRACE_JS}</script>
</body>
</html>
"""


def write(results_folder: Path, out: Path) -> int:
    """Write the page of every Result (`*.json`) directly in the folder; a missing folder counts as empty.

    Returns:
        How many Results are on the page; damaged files are named there and not counted.

    Raises:
        InputError: the folder is a file, or cannot be read.
        CacheError: the page cannot be written.
    """
    results: list[Result] = []
    unreadable: list[str] = []
    try:
        paths = sorted(results_folder.iterdir())
    except FileNotFoundError:
        paths = []
    except OSError as error:
        raise InputError(f"results_folder: cannot read {results_folder} ({error.strerror})") from error
    for path in paths:
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        try:
            result = Result.load(path)
            _section(result, "")  # JSON of the wrong shape may only show when it is drawn
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            unreadable.append(path.name)
        else:
            results.append(result)
    with atomic_write(out, "wb") as file:  # bytes: the page says it is UTF-8, whatever the locale
        file.write(render(results, unreadable).encode())
    return len(results)


def _anchors(results: Sequence[Result]) -> list[str]:
    """One id for each section: the slug, with a number if it came before (a quick and a full run, say)."""
    seen: dict[str, int] = {}
    anchors = []
    for result in results:
        seen[result.slug] = seen.get(result.slug, 0) + 1
        anchors.append(result.slug if seen[result.slug] == 1 else f"{result.slug}-{seen[result.slug]}")
    return anchors


def _damage(names: Iterable[str]) -> str:
    listed = "".join(f"<li><code>{escape(name)}</code></li>" for name in names)
    if not listed:
        return ""
    return f'<div class="how" role="note"><p>These files could not be read as Results:</p><ul>{listed}</ul></div>'


def _verdict(verdict: str) -> str:
    kind, symbol = _BADGES[verdict]
    return f'<span class="verdict {kind}"><span aria-hidden="true">{symbol}</span> {escape(verdict)}</span>'


def _quick(result: Result) -> str:
    return ' <span class="badge">quick</span>' if result.quick else ""


def _value(figure: Figure) -> str:
    low, high = figure.interval
    return f'<span class="value"><b>{number(figure.value)}</b> [{number(low)}, {number(high)}]</span>'


def _summary(results: Sequence[Result], anchors: Sequence[str]) -> str:
    """A group of rows for each Result, a row for each headline figure; on narrow screens each group is a card."""
    groups = []
    for result, anchor in zip(results, anchors, strict=True):
        figures = [figure for figure in result.figures if figure.headline]
        span = f' rowspan="{len(figures)}"'
        about = (
            f'<td class="paper"{span}><a href="#{escape(anchor)}">{escape(result.slug)}</a>{_quick(result)}<br>'
            f'{_verdict(result.verdict)}</td><td class="claim"{span}>{escape(result.claim)}</td>'
        )
        rows = [
            f"<td>{escape(figure.name)}</td><td>{_value(figure)} {escape(figure.unit)}</td>"
            f"<td>{interval_plot(figure)}</td>"
            f"<td{_label('paper', figure.paper)}>{escape(figure.paper)}</td><td>{_verdict(figure.verdict)}</td>"
            for figure in figures
        ]
        rows[0] = about + rows[0]
        groups.append("<tbody>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</tbody>")
    names = (
        "Paper",
        "Claim",
        "Headline figure",
        "Measured [95% interval]",
        "Against the threshold",
        "In the paper",
        "Verdict",
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<table class="summary"><thead><tr>{head}</tr></thead>{"".join(groups)}</table>'


def _label(name: str, content: str) -> str:
    """What the cell is, for the cards of narrow screens, which have no column headings."""
    return f' data-label="{name}"' if content else ""


def _section(result: Result, anchor: str) -> str:
    parts = [
        f'<section id="{escape(anchor)}"><h2>{escape(result.slug)}{_quick(result)}</h2>',
        f"<p>{escape(result.claim)}</p><p>{_verdict(result.verdict)}</p>",
        "<h3>Figures</h3>" + _figures(result.figures),
    ]
    if result.table:
        parts.append("<h3>In detail</h3>" + _table(result.table))
    if result.series:
        parts.append(f'<h3>Plots</h3><div class="charts">{"".join(map(line_chart, result.series))}</div>')
    if result.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
        parts.append(f'<h3>Notes</h3><ul class="notes">{notes}</ul>')
    parts.append(_conditions(result))
    parts += map(_trace, result.traces)
    return "\n".join(parts) + "</section>"


def _figures(figures: Iterable[Figure]) -> str:
    # The verdict comes early: on a narrow screen the rest is only seen by scrolling.
    heads = ["Figure", "Verdict", "Measured [95% interval]", "Ours", "Baseline"]
    heads += ["Confirm at", "Refute below", "In the paper"]
    rows = []
    for figure in figures:
        baseline = f"<br><small>{escape(figure.baseline_name)}</small>" if figure.baseline_name else ""
        cells = [
            escape(figure.name) + (' <span class="badge">headline</span>' if figure.headline else ""),
            _verdict(figure.verdict),
            f"{_value(figure)}<br><small>{escape(figure.unit)}</small>",
            number(figure.ours),
            number(figure.baseline) + baseline,
            number(figure.confirm_at),
            number(figure.refute_below),
            escape(figure.paper),
        ]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    return _scrolled("figures", heads, rows)


def _table(table: Sequence[dict[str, Any]]) -> str:
    heads = list(table[0])
    columns = [_column([row[head] for row in table]) for head in heads]
    return _scrolled("", heads, ["".join(cells) for cells in zip(*columns, strict=True)])


def _column(values: Sequence[Any]) -> list[str]:
    """Cells; numbers with as many decimals as the column needs, at most four, so that they line up."""
    places = [len(repr(v).partition(".")[2]) for v in values if isinstance(v, float) and 1e-3 <= abs(v) < 1e7]
    decimals = min(max(places, default=0), 4)
    cells = []
    for value in values:
        plain = isinstance(value, float) and (value == 0 or 1e-3 <= abs(value) < 1e7)
        kind = ' class="num"' if isinstance(value, int | float) else ""
        cells.append(f"<td{kind}>{f'{value:.{decimals}f}' if plain else escape(number(value))}</td>")
    return cells


def _scrolled(kind: str, heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    # Focusable, so that it can be scrolled from the keyboard.
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _trace(data: dict[str, Any]) -> str:
    trace = Trace.from_dict(data)
    title = str(trace.meta.get("title", "Trace"))
    return f"<h3>{escape(title)}</h3>{trace_fragment(trace, style=False, script=False)}"


def _conditions(result: Result) -> str:
    run = {
        "model": result.model,
        "seeds": ", ".join(map(str, result.seeds)),
        "took": f"{result.seconds / 60:.1f} minutes" if result.seconds >= 120 else f"{result.seconds:.0f} seconds",
        "created": result.created,
    }
    lists = [_pairs("Run", run), _pairs("Settings", result.settings), _pairs("Machine", result.machine)]
    return f'<div class="conditions">{"".join(lists)}</div>'


def _pairs(name: str, pairs: dict[str, Any]) -> str:
    if not pairs:
        return ""
    listed = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(value if isinstance(value, str) else json.dumps(value))}</dd>"
        for key, value in pairs.items()
        if value not in ("", None)
    )
    return f"<div><h3>{name}</h3><dl>{listed}</dl></div>"
