"""The catalogue of papers: what each claims, and where its code, measurement, tests and page are.

    get("token-recycling").entry_point     # "tokenworks.decode.token_recycling:TokenRecycling"
    find("speculative tree", family="decode")

The facts live in `catalog.toml`; this module only reads them. It imports no method, so that looking a paper up
costs nothing.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Literal

from tokenworks.core.errors import InputError

FAMILIES = ("tokenize", "train", "align", "compress", "compute", "decode", "reason", "prompt", "synth")
"""The package folders a paper can belong to."""


@dataclass(frozen=True)
class Paper:
    """One published method.

    Attributes:
        slug: its name everywhere in the library, in kebab-case.
        title: the paper's title, exactly.
        family: one of `FAMILIES`.
        claim: what the paper says it achieves, in our words with its figures; not our own measurement.
        status: "done" when the method, its measurement, tests and page are here, else "planned".
        arxiv: identifier on arXiv, None when unknown.
        certainty: of our account of the method; "low" is a reconstruction from the abstract, None not studied yet.
        entry_point: "module:name" of the method; this and the next three are None unless `status` is "done".
        reproduce: module under `tokenworks.reproduce` that measures the claim.
        test: its test file, from the repository's root.
        docs: its section in the documentation, as "file#anchor".
        missing: which part of the paper is not here, None when nothing is missing.
    """

    slug: str
    title: str
    family: str
    claim: str
    status: Literal["planned", "done"]
    arxiv: str | None = None
    certainty: Literal["high", "medium", "low"] | None = None
    entry_point: str | None = None
    reproduce: str | None = None
    test: str | None = None
    docs: str | None = None
    missing: str | None = None


def load_catalog() -> dict[str, Paper]:
    """Every paper by its slug, in the order of the file (by family, then by name)."""
    text = files("tokenworks").joinpath("catalog.toml").read_text(encoding="utf-8")
    return {slug: Paper(slug=slug, **fields) for slug, fields in tomllib.loads(text).items()}


def find(search: str = "", family: str = "") -> list[Paper]:
    """Papers in which every word of `search` occurs, in slug, title or claim; upper and lower case are the same.

    Args:
        search: words separated by blanks; a part of a word is enough. Empty: every paper.
        family: one of `FAMILIES`. Empty: all of them.

    Raises:
        InputError: there is no such family.
    """
    if family and family not in FAMILIES:
        raise InputError(f"family: there is no {family!r}. Choose one of: {', '.join(FAMILIES)}.")
    words = search.casefold().split()

    def matches(paper: Paper) -> bool:
        text = f"{paper.slug} {paper.title} {paper.claim}".casefold()
        return all(word in text for word in words)

    return [paper for paper in load_catalog().values() if family in ("", paper.family) and matches(paper)]


def get(slug: str) -> Paper:
    """The paper called `slug`; `token_recycling` and `Token-Recycling` mean `token-recycling`.

    Raises:
        InputError: there is no such paper; the message names the closest ones.
    """
    catalog = load_catalog()
    wanted = slug.strip().lower().replace("_", "-")
    if wanted in catalog:
        return catalog[wanted]
    close = get_close_matches(wanted, catalog)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`tokenworks papers` lists them all."
    raise InputError(f"slug: there is no paper {slug!r}. {hint}")
