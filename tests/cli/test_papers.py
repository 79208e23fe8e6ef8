"""`tokenworks papers`, in an app of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tokenworks.cli.papers import papers
from tokenworks.core.errors import InputError

Run = Callable[..., Any]
"""Runs the command with these arguments; typer gives its result type no public name."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(papers)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_table_lists_all_and_counts(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("61 papers, ")
    assert all(
        word in result.stdout for word in ("slug", "title", "family", "status", "token-recycling", "planned")
    )


def test_a_narrow_terminal_keeps_the_slug_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert "freecache-guided-diffusion" in run("--family", "decode").stdout


def test_search_and_family(run: Run) -> None:
    result = run("--search", "optimal transport", "--family", "decode")
    assert "spectr" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 paper, ")


def test_json_has_the_promised_keys(run: Run) -> None:
    entries = json.loads(run("--json").stdout)
    assert len(entries) == 61
    for entry in entries:
        assert set(entry) == {"slug", "title", "family", "status", "entry_point", "claim", "certainty"}
        assert (entry["entry_point"] is None) == (entry["status"] == "planned")


def test_json_of_nothing_is_an_empty_list(run: Run) -> None:
    assert json.loads(run("--json", "--search", "no-such-word").stdout) == []


def test_unknown_family_is_an_input_error(run: Run) -> None:
    result = run("--family", "nonsense")
    assert isinstance(result.exception, InputError)
