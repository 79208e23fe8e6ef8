"""`tokenworks models`: the embedded models, and fetching one ahead of time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def models(
    fetch_: Annotated[
        str | None,
        typer.Option(
            "--fetch", metavar="NAME", help="Fetch and convert this one now, so that it loads at once later."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the models that come with tokenworks. Any Hub id, folder or .gguf file works as well."""
    from tokenworks.core.models import fetch, list_models  # here, because torch takes seconds

    if fetch_ is not None:
        fetch(fetch_)
    found = list_models()
    if json_:
        typer.echo(json.dumps([asdict(model) | {"folder": str(model.folder)} for model in found], indent=2))
        return
    table = Table("name", "parameters", "licence", "download", "fetched")
    for model in found:
        table.add_row(
            model.name,
            f"{model.parameters / 1e6:.0f}M, {model.kind}",
            model.licence,
            f"{model.megabytes} MB",
            "yes" if model.cached else "no",
        )
    Console().print(table)
    typer.echo(f"Folder: {found[0].folder.parent}")
