"""The catalogue: complete, well formed, and true about what is in the repository."""

from __future__ import annotations

import importlib
import re
import unicodedata
from pathlib import Path

import pytest

from tokenworks.core.catalog import FAMILIES, Paper, find, get, load_catalog
from tokenworks.core.errors import InputError

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
DONE = [paper for paper in CATALOG.values() if paper.status == "done"]


def anchors(page: Path) -> set[str]:
    """The anchors mkdocs makes of a page's headings (as `markdown.extensions.toc.slugify` does)."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", prose, flags=re.MULTILINE):
        text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()))
    return found


def test_every_paper_is_there_once() -> None:
    assert len(CATALOG) == 61
    assert len({paper.title for paper in CATALOG.values()}) == 61
    assert len({paper.arxiv for paper in CATALOG.values()}) == 61


@pytest.mark.parametrize("paper", CATALOG.values(), ids=CATALOG)
def test_fields_are_well_formed(paper: Paper) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.slug)
    assert paper.family in FAMILIES
    assert paper.status in ("planned", "done")
    assert paper.certainty in ("high", "medium", "low", None)
    assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert len(paper.claim.split()) >= 10, "a claim says what was achieved"
    assert paper.claim.endswith(".")
    assert paper.claim.rstrip(".").casefold() not in paper.title.casefold()
    assert paper.title.casefold() not in paper.claim.casefold()


@pytest.mark.parametrize("paper", DONE, ids=[paper.slug for paper in DONE])
def test_done_means_method_measurement_test_and_page(paper: Paper) -> None:
    assert paper.entry_point
    assert paper.reproduce
    assert paper.test
    assert paper.docs
    module, name = paper.entry_point.split(":")
    assert module.startswith(f"tokenworks.{paper.family}.")
    assert callable(getattr(importlib.import_module(module), name))
    assert (ROOT / f"src/tokenworks/reproduce/{paper.reproduce}.py").is_file()
    assert (ROOT / paper.test).is_file()
    page, anchor = paper.docs.split("#")
    assert anchor in anchors(ROOT / page)


@pytest.mark.parametrize("paper", CATALOG.values(), ids=CATALOG)
def test_planned_promises_nothing(paper: Paper) -> None:
    if paper.status == "planned":
        assert (paper.entry_point, paper.reproduce, paper.test, paper.docs) == (None, None, None, None)


def test_anchors_are_those_of_mkdocs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Décode: *fast* ones\n```\n# no heading\n```\n## Token  Recycling ##\n", encoding="utf-8")
    assert anchors(page) == {"decode-fast-ones", "token-recycling"}


def test_find_needs_every_word_in_any_case() -> None:
    slugs = [paper.slug for paper in find("SPECULATIVE optimal")]
    assert "spectr" in slugs
    assert "rsd" not in slugs
    assert find() == list(CATALOG.values())
    assert find("no-such-word-anywhere") == []


def test_find_keeps_to_the_family() -> None:
    assert {paper.family for paper in find(family="align")} == {"align"}
    assert sum(len(find(family=family)) for family in FAMILIES) == 61
    with pytest.raises(InputError, match=r"family: there is no 'decoding'.*tokenize, .*decode"):
        find(family="decoding")


@pytest.mark.parametrize("name", ["token-recycling", "token_recycling", " Token-Recycling "])
def test_get_forgives_spelling(name: str) -> None:
    assert get(name).slug == "token-recycling"


def test_get_suggests_close_names() -> None:
    with pytest.raises(
        InputError, match=r"slug: there is no paper 'token-recyling'\. Did you mean token-recycling"
    ):
        get("token-recyling")
    with pytest.raises(InputError, match="tokenworks papers"):
        get("zzzzzz")
