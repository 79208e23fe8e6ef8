"""`tokenworks models`: the embedded models, and fetching one ahead of time."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenworks.core.errors import ModelNotFoundError


def models(
    fetch_: Annotated[
        str | None, typer.Option("--fetch", help="Fetch and convert this one now, so that it loads at once later.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the models that come with tokenworks. Any Hub id, folder or .gguf file works as well."""
    from tokenworks.core.models import EMBEDDED, MANIFEST, fetch

    if fetch_ is not None:
        if fetch_ not in EMBEDDED:
            raise ModelNotFoundError(
                f"fetch: there is no embedded model {fetch_!r}; there are {', '.join(EMBEDDED)}"
            )
        typer.echo(f"{fetch_} is in {fetch(fetch_)}")
        return
    rows = [
        {
            "name": spec.name,
            "parameters": spec.parameters,
            "licence": spec.licence,
            "download_mb": spec.megabytes,
            "fetched": (spec.folder / MANIFEST).exists(),
        }
        for spec in EMBEDDED.values()
    ]
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for heading in ("name", "parameters", "licence", "download", "fetched"):
        table.add_column(heading)
    for row in rows:
        fetched = "yes" if row["fetched"] else "no"
        table.add_row(
            str(row["name"]), str(row["parameters"]), str(row["licence"]), f"{row['download_mb']} MB", fetched
        )
    Console().print(table)
