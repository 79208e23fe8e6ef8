"""A Trace as HTML: harmless whatever the tokens say, readable without scripts, several on one page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from tokenworks.core.trace import Trace
from tokenworks.core.trace_html import TRACE_CSS, TRACE_JS, trace_fragment, trace_page

HOSTILE = "</script><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text inside scripts, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def sample() -> Trace:
    trace = Trace(["The", " sky", "\n", ""], [5, 6, 7, 8], meta={"title": "Why?"})
    trace.add("source", ["target", "draft", None, "draft"], "who proposed it")
    return trace.add("entropy", [0.0, 8.0, float("nan"), 4.0], "in bits")


def embedded(fragment: str) -> dict[str, Any]:
    return json.loads(Elements(fragment).scripts[0])


def test_without_scripts_the_first_channel_is_shown() -> None:
    fragment = trace_fragment(sample(), script=False)
    assert re.findall(r'<span class="(c?\d?)" tabindex', fragment) == ["c0", "c1", "", "c1"]
    legends = re.findall(r'class="tw-legend"( hidden)?', fragment)
    assert legends == ["", " hidden"]


def test_the_script_gets_every_value_as_text() -> None:
    data = embedded(trace_fragment(sample()))
    assert data["ids"] == [5, 6, 7, 8]
    source, entropy = data["channels"]
    assert source["shown"] == ["target", "draft", "–", "draft"]
    assert entropy == {
        "name": "entropy",
        "about": "in bits",
        "shown": ["0", "8", "–", "4"],
        "classes": ["n0", "n8", "", "n4"],
    }


def test_newlines_empty_tokens_and_control_characters_can_be_seen() -> None:
    fragment = trace_fragment(Trace(["a\n", "", "\x1b[31m", "\u202eevil", "\ud800"]))
    assert "a<i>⏎</i>\n" in fragment
    assert "<i>◌</i>" in fragment
    assert "<i>␛</i>[31m" in fragment
    assert "<i>[U+202E]</i>evil" in fragment
    fragment.encode()  # a lone surrogate would fail here


@pytest.mark.parametrize("hostile", [HOSTILE, '"><b onclick="x">', "<!--<script>", "&lt;", "]]>", "</style>"])
def test_hostile_text_stays_text(hostile: str) -> None:
    trace = Trace([hostile], [1], {}, {"title": hostile})
    trace.add(hostile, [hostile], hostile)
    plain = Elements(trace_page(Trace(["x"], [1]).add("x", ["x"], "x"), "x"))
    page = Elements(trace_page(trace, hostile))
    assert [tag for tag, _ in page.found] == [tag for tag, _ in plain.found]
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert page.text.count(hostile) == 7  # title and heading; button; name, category, description; token
    assert json.loads(page.scripts[0])["channels"][0]["shown"] == [hostile]


def test_two_fragments_of_one_trace_have_ids_of_their_own() -> None:
    trace = sample()
    both = Elements(trace_fragment(trace) + trace_fragment(trace))
    ids = [attributes["id"] for _, attributes in both.found if "id" in attributes]
    assert len(ids) == len(set(ids)) == 4


def test_style_and_script_can_be_left_to_the_page() -> None:
    bare = trace_fragment(sample(), style=False, script=False)
    assert TRACE_CSS not in bare
    assert TRACE_JS not in bare
    whole = trace_fragment(sample())
    assert whole.count(TRACE_CSS) == whole.count(TRACE_JS) == 1


def test_all_styles_are_scoped() -> None:
    for selectors in re.findall(r"([^{}]+)\{", TRACE_CSS):
        if not selectors.strip().startswith("@media"):
            assert all(one.strip().startswith(".tw-trace") for one in selectors.split(",")), selectors


def test_nothing_is_fetched() -> None:
    page = trace_page(sample(), "Why?")
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", page)


@pytest.mark.parametrize(
    "channel",
    [
        {"values": [None, None]},
        {"values": [3, 3]},
        {"values": [1.0, 2.0], "low": 5.0, "high": 4.0},
        {"values": [-1e308, 1e308]},
        {"values": [0.0, 1.0], "high": float("inf")},
        {"values": [-9.0, 9.0], "low": 0.0, "high": 1.0},
    ],
)
def test_odd_channels_still_render(channel: dict[str, Any]) -> None:
    trace = Trace(["a", "b"])
    trace.add("odd", **channel)
    for name in embedded(trace_fragment(trace))["channels"][0]["classes"]:
        assert re.fullmatch(r"|n[0-8]", name)


def test_many_categories_all_have_a_style() -> None:
    names = [f"category {n}" for n in range(100)]
    fragment = trace_fragment(Trace(names).add("name", names), style=False, script=False)
    used = set(re.findall(r'"tw-swatch (c\d+)"', fragment))
    assert len(used) == 40
    assert all(f".tw-trace .{name}{{" in TRACE_CSS for name in used)


def test_no_tokens_and_no_channels() -> None:
    assert 'class="tw-strip"' in trace_fragment(Trace([]))
    assert embedded(trace_fragment(Trace(["a"]))) == {"ids": None, "channels": []}
