"""`tokenworks papers`: which published methods the library knows, and which of them it has."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenworks.core.catalog import Paper, find

JSON_KEYS = ("slug", "title", "family", "status", "entry_point", "claim", "certainty")


def papers(
    search: Annotated[str, typer.Option("--search", help="Words that must all be in slug, title or claim.")] = "",
    family: Annotated[str, typer.Option("--family", help="Only this family, such as decode or align.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the papers and whether each is done or planned."""
    found = find(search, family)
    if json_:
        typer.echo(json.dumps([{key: getattr(paper, key) for key in JSON_KEYS} for paper in found], indent=2))
        return
    console = Console()
    console.print(_table(found))
    done = sum(paper.status == "done" for paper in found)
    console.print(f"{len(found)} {'paper' if len(found) == 1 else 'papers'}, {done} done")


def _table(found: list[Paper]) -> Table:
    table = Table()
    # A slug is typed into the next command, so it is never cut; the title gives way in a narrow terminal.
    table.add_column("slug", no_wrap=True)
    table.add_column("title", overflow="fold")
    table.add_column("family", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for paper in found:
        table.add_row(paper.slug, paper.title, paper.family, paper.status)
    return table
