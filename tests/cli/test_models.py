"""`tokenworks models`, in an app of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tokenworks.cli.models import models
from tokenworks.core.errors import ModelNotFoundError

app = typer.Typer()
app.command()(models)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TOKENWORKS_CACHE", str(tmp_path))
    return tmp_path / "models"


def test_table(cache: Path) -> None:
    out = CliRunner().invoke(app).stdout
    for word in (
        "smollm2-135m",
        "135M, instruction-tuned",
        "Apache-2.0",
        "93 MB",
        "gemma-3-270m",
        "Gemma Terms of Use",
    ):
        assert word in out
    assert "yes" not in out
    assert str(cache) in out.replace("\n", "")


def test_json(cache: Path) -> None:
    first, second = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert first == {
        "name": "smollm2-135m",
        "parameters": 134_515_008,
        "kind": "instruction-tuned",
        "licence": "Apache-2.0",
        "megabytes": 93,
        "cached": False,
        "folder": str(cache / "smollm2-135m"),
    }
    assert (second["name"], second["kind"]) == ("gemma-3-270m", "base model")


def test_fetch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("tokenworks.core.models.fetch", asked.append)
    assert CliRunner().invoke(app, ["--fetch", "smollm2-135m"]).exit_code == 0
    assert asked == ["smollm2-135m"]


def test_fetch_of_an_unknown_name() -> None:
    error = CliRunner().invoke(app, ["--fetch", "gpt"]).exception
    assert isinstance(error, ModelNotFoundError)
    assert "there are smollm2-135m, gemma-3-270m" in str(error)
