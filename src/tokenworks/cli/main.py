"""`tokenworks`: the verbs put together, and errors turned into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tokenworks import __version__
from tokenworks.core.errors import TokenworksError

# Quiet before the libraries are imported: a user asked for text, not for the loading bars of three packages.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    name="tokenworks",
    help="Token-level methods for language models: run them on your model, see what each did at every token, and "
    "measure whether the paper's claim holds on your machine.\n\n"
    'Start with: tokenworks generate "Why is the sky blue?" --trace',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tokenworks {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _add_verbs() -> None:
    from tokenworks.cli.align import align
    from tokenworks.cli.bench import bench
    from tokenworks.cli.diffuse import diffuse
    from tokenworks.cli.generate import generate
    from tokenworks.cli.infill import infill
    from tokenworks.cli.models import models
    from tokenworks.cli.papers import papers
    from tokenworks.cli.report import report
    from tokenworks.cli.reproduce import reproduce
    from tokenworks.cli.train import train

    for verb in (generate, infill, diffuse, papers, models, reproduce, report):
        app.command()(verb)
    for group in (align, bench, train):
        app.add_typer(group)


_add_verbs()


def main() -> None:
    """Run the command line: a user's mistake gives one line and the error's exit code; Ctrl-C gives 130."""
    try:
        app()
    except TokenworksError as error:
        print(f"tokenworks: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
