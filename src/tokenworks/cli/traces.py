"""Showing and keeping a Trace: what every verb that leaves one does alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write

if TYPE_CHECKING:
    from tokenworks.core.trace import Trace


def check_trace_out(out: Path | None) -> None:
    """Raise `InputError` for a file that a Trace cannot be written to, before anything is loaded."""
    if out is not None and out.suffix not in (".html", ".json"):
        raise InputError(f"trace-out: {out} must end in .html or .json")


def show_trace(trace: Trace, channel: str, shown: bool, out: Path | None, err: bool) -> None:
    """Print one channel if it is to be `shown`, on stderr if stdout is for JSON, and write the Trace to `out`."""
    if shown:
        typer.echo(trace.to_terminal(channel), err=err)
    if out is not None:
        with atomic_write(out) as file:
            file.write(trace.to_html() if out.suffix == ".html" else json.dumps(trace.to_dict()))
