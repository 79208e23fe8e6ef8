"""Reproductions: each paper's claim measured again on a small machine, as a `Result` with a computed verdict.

One module per paper under its slug, with a function `run(settings: Run) -> Result`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenworks.core import catalog
from tokenworks.core.errors import InputError
from tokenworks.core.measure import machine_facts
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result

__all__ = ["Figure", "Ledger", "Result", "Run", "available", "reproduce"]


@dataclass(frozen=True)
class Run:
    """How a reproduction is to be run.

    Args:
        seeds: how many seeds (what a seed varies is the reproduction's to say), at least 1.
        quick: a small sample, for a first look; its Result says so.
        folder: where Results go, and the ledgers of unfinished runs.
        progress: called with the pieces done, the pieces in all, and what is being done.
    """

    seeds: int
    quick: bool
    folder: Path
    progress: Callable[[int, int, str], None] = lambda done, total, what: None


def available() -> list[str]:
    """The slugs of all papers that have a reproduction."""
    return [paper.slug for paper in catalog.load_catalog().values() if paper.reproduce]


def reproduce(slug: str, run: Run) -> Result:
    """Measure a paper's claim again and keep the Result as `folder/slug.json` (`slug.quick.json` if quick).

    Raises:
        InputError: no such paper, no reproduction for it yet, or fewer than one seed.
    """
    paper = catalog.get(slug)
    if paper.reproduce is None:
        raise InputError(f"slug: {paper.slug} has no reproduction yet; there are {', '.join(available())}")
    if run.seeds < 1:
        raise InputError(f"seeds: {run.seeds} is not at least 1")
    module = importlib.import_module(f"tokenworks.reproduce.{paper.reproduce}")
    result: Result = module.run(run)
    result.claim, result.machine, result.quick = paper.claim, machine_facts(), run.quick
    result.created = datetime.now(UTC).isoformat(timespec="seconds")
    result.save(run.folder / f"{paper.slug}{'.quick' if run.quick else ''}.json")
    return result
