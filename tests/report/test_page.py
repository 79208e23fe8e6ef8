"""The report: every Result with its verdicts on one page, whatever is in the files."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tokenworks.core.errors import InputError
from tokenworks.core.trace import Trace
from tokenworks.core.trace_html import TRACE_CSS, TRACE_JS
from tokenworks.report import render, write
from tokenworks.report.plots import interval_plot, line_chart, number
from tokenworks.reproduce.result import CONFIRMED, NOT_CONFIRMED, REFUTED, Figure, Result

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"


def figure(name: str = "speed", low: float = 1.3, high: float = 1.5, **others: Any) -> Figure:
    fields: dict[str, Any] = {"confirm_at": 1.2, "refute_below": 1.0, "ours": 2.5, "headline": True}
    return Figure(name, "times", (low + high) / 2, (low, high), **{**fields, **others})


def result(slug: str = "token-recycling", figures: list[Figure] | None = None, **others: Any) -> Result:
    fields: dict[str, Any] = {"seeds": [0], "seconds": 61.0, "model": "a model"}
    return Result(slug, "It is faster.", figures or [figure()], **{**fields, **others})


def full(text: str = "words") -> Result:
    """A Result with everything that it can have, all of it saying `text`."""
    trace = Trace([text, "\n"], [1, 2], {}, {"title": text})
    trace.add(text, [text, None], text).add("entropy", [1.0, float("nan")])
    line = {"name": text, "x": [1, 2], "y": [3.0, 4.0], "low": [2.0, 3.0], "high": [4.0, 5.0]}
    about = {"baseline": 1.0, "baseline_name": text, "paper": text}
    return Result(
        text,
        text,
        [figure(text, **about), figure("second", headline=False)],
        [0],
        61.0,
        text,
        {text: [text]},
        {text: text},
        True,
        [{text: text, "n": 1.25, "m": None}],
        [{"title": text, "x_label": text, "y_label": text, "lines": [line]}],
        [trace.to_dict()],
        [text],
        text,
    )


def tags(page: str) -> list[str]:
    return re.findall(r"<(/?[a-zA-Z!][\w-]*)", page)


def test_no_results_say_how_to_make_some(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    assert write(tmp_path / "nowhere", out) == 0
    assert "tokenworks reproduce token-recycling --quick" in out.read_text("utf-8")


def test_every_figure_has_its_verdict() -> None:
    figures = [figure("good"), figure("poor", 0.5, 0.9), figure("open", 0.9, 1.3, headline=False)]
    page = render([result(figures=figures)])
    section = page[page.index("<section") :]
    rows = {
        name: row
        for row in re.findall(r"<tr>.*?</tr>", section)
        for name in ("good", "poor", "open")
        if name in row
    }
    assert "✓" in rows["good"]
    assert CONFIRMED in rows["good"]
    assert "✗" in rows["poor"]
    assert REFUTED in rows["poor"]
    assert "○" in rows["open"]
    assert NOT_CONFIRMED in rows["open"]
    summary = page[page.index('class="summary"') : page.index("</table>")]
    assert "good" in summary
    assert "open" not in re.findall(r"<td>(\w+)</td>", summary)


def test_everything_of_a_result_is_on_the_page() -> None:
    page = render([full("qzx")])
    trace = page[page.index('class="tw-trace"') : page.index("<script>")]
    assert page.count("qzx") - trace.count("qzx") >= 18
    assert page.count(TRACE_CSS) == page.count(TRACE_JS) == 1


def test_hostile_text_stays_text() -> None:
    page = render([full(HOSTILE)], [HOSTILE], title=HOSTILE)
    assert "<img" not in page
    assert tags(page) == tags(render([full()], ["x"], title="x"))


def test_nothing_is_fetched() -> None:
    page = render([full()])
    assert not re.search(r"""src\s*=|href\s*=\s*["']?(?!"?#)|url\(|@import|https?:""", page)


def test_results_with_one_slug_have_sections_of_their_own() -> None:
    page = render([result("a"), result("a", quick=True), result("b")])
    ids = re.findall(r'<section id="([^"]*)"', page)
    assert ids == ["a", "a-2", "b"]
    assert re.findall(r'href="#([^"]*)"', page) == ids


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    result().save(folder / "good.json")
    good = json.loads((folder / "good.json").read_text())
    damaged: dict[str, str | bytes] = {
        "half.json": "{",
        "list.json": "[]",
        "bytes.json": b"\xff\xfe",
        "field.json": json.dumps({**good, "colour": 1}),
        "headless.json": json.dumps({**good, "figures": []}),
        "series.json": json.dumps({**good, "series": [{"title": "no lines"}]}),
        "trace.json": json.dumps({**good, "traces": [{"tokens": ["a"]}]}),
        "deep.json": "[" * 100_000,
        "<b>.json": "",
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder.json").mkdir()
    (folder / ".half-written.json").write_text("{")
    (folder / "notes.txt").write_text("not a Result")
    assert write(folder, tmp_path / "report.html") == 1
    page = (tmp_path / "report.html").read_text("utf-8")
    named = re.findall(r"<li><code>(.*?)</code>", page)
    assert sorted(named) == sorted([*(set(damaged) - {"<b>.json"}), "&lt;b&gt;.json", "folder.json"])


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(InputError, match="results_folder"):
        write(tmp_path / "results", tmp_path / "report.html")


def test_values_that_are_not_finite() -> None:
    endless = figure("endless", 1.0, math.inf, baseline=math.nan)
    page = render([result(figures=[endless], table=[{"a": math.nan}, {"a": 1.5}])])
    assert "∞" in page
    assert "nan" not in re.findall(r">(\w+)<", page)
    ElementTree.fromstring(interval_plot(endless))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"name": "empty", "x": [], "y": []}],
        [{"name": "point", "x": [1], "y": [0.0]}],
        [{"name": "flat", "x": [0, 1], "y": [7, 7]}],
        [{"name": "gaps", "x": [0, 1, 2, 3], "y": [1.0, None, math.nan, 1e-9]}],
        [{"name": "large", "x": [0, 1e9], "y": [-1e12, 1e12]}],
        [{"name": f"line {n}", "x": [0, 1], "y": [n, n], "low": [n - 1, n - 1], "high": [n, n]} for n in range(9)],
    ],
)
def test_charts_are_well_formed_and_stay_inside(lines: list[dict[str, Any]]) -> None:
    chart = ElementTree.fromstring(line_chart({"title": "t", "x_label": "x", "y_label": "y", "lines": lines}))
    for dot in chart.iter("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= 360
        assert 0 <= float(dot.attrib["cy"]) <= 230
    for text in chart.iter("text"):
        assert text.text
    assert len(chart.findall(".//li")) == (0 if not any(line["x"] for line in lines) else len(lines))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.1, "2.10"), (0.97, "0.970"),
     (1234.5, "1234"), (0.0, "0"), (-0.5, "−0.500"), (1e-7, "1.00e−07"), (None, "–"),
     (3, "3"), (math.nan, "–"), (-math.inf, "−∞"), (True, "True")],
)  # fmt: skip
def test_numbers(value: Any, shown: str) -> None:
    assert number(value) == shown
