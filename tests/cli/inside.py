"""The command line within this process: a new one takes seconds to import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import CliRunner

from tokenworks.cli.main import app
from tokenworks.core.errors import TokenworksError


@dataclass(frozen=True)
class Done:
    """What a command came to, as its process would have ended."""

    returncode: int
    stdout: str
    stderr: str


def call(*arguments: str, given: bytes | None = None) -> Done:
    """Run `tokenworks` with these arguments; any error that is not for users is raised."""
    found = CliRunner().invoke(app, list(arguments), input=given)
    if isinstance(found.exception, TokenworksError):
        return Done(found.exception.exit_code, found.stdout, f"{found.stderr}tokenworks: {found.exception}")
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Done(found.exit_code, found.stdout, found.stderr)
