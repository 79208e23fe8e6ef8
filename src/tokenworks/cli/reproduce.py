"""`tokenworks reproduce`: measure a paper's claim again on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenworks.core.errors import InputError


def reproduce(
    slug: Annotated[str | None, typer.Argument(help="The paper; `tokenworks papers` lists them.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every paper that has a reproduction.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A small sample, for a first look.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds to run.")] = 1,
    folder: Annotated[Path, typer.Option("--results", help="Where Results are kept, as JSON.")] = Path("results"),
    json_: Annotated[bool, typer.Option("--json", help="Print the Result as JSON.")] = False,
) -> None:
    """Measure a paper's claim again, against the baseline in the same run; the verdict follows from the interval.

    A run that is cut off goes on where it stopped when it is started again with the same options.
    """
    if all_ == (slug is not None):
        raise InputError("slug: name one paper, or pass --all (not both)")
    from tokenworks import reproduce as lab

    results = []
    for name in lab.available() if all_ else [str(slug)]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task(name, total=None)

            def show(done: int, total: int, what: str, name: str = name) -> None:
                bar.update(task, completed=done, total=total, description=f"{name}: {what}")  # noqa: B023

            results.append(lab.reproduce(name, lab.Run(seeds, quick, folder, show)))
    if json_:
        typer.echo(json.dumps([r.to_dict() for r in results] if all_ else results[0].to_dict()))
        return
    for result in results:
        Console().print(_table(result))
        typer.echo(f"{result.slug}: {result.verdict}{' (quick run)' if quick else ''}")


def _table(result) -> Table:  # type: ignore[no-untyped-def]  # lab is imported late: it brings PyTorch
    table = Table(title=result.slug)
    for heading in ("figure", "measured [95% interval]", "ours", "baseline", "paper", "verdict"):
        table.add_column(heading, overflow="fold")
    for figure in result.figures:
        low, high = figure.interval
        baseline = "" if figure.baseline is None else f"{figure.baseline:.2f} ({figure.baseline_name})"
        table.add_row(
            f"{'*' if figure.headline else ''}{figure.name}",
            f"{figure.value:.2f} [{low:.2f}, {high:.2f}] {figure.unit}",
            f"{figure.ours:.2f}",
            baseline,
            figure.paper,
            figure.verdict,
        )
    table.caption = "* the verdict rests on these"
    return table
