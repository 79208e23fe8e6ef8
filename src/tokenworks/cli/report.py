"""`tokenworks report`: all Results as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    folder: Annotated[Path, typer.Option("--results", help="Where `tokenworks reproduce` kept them.")] = Path(
        "results"
    ),
) -> None:
    """Write one self-contained HTML page of all Results: claims, intervals, verdicts, plots and Traces."""
    from tokenworks.report import write

    count = write(folder, out)
    typer.echo(f"{count} {'Result' if count == 1 else 'Results'} in {out}")
