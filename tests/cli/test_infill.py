"""`tokenworks infill` and `tokenworks diffuse`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tokenworks.cli.infill import with_holes
from tokenworks.cli.main import app
from tokenworks.core.errors import InputError
from tokenworks.decode.any_subset import load_any_subset


def run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=text)


def refused(*args: str, words: str) -> None:
    found = run(*args)
    assert isinstance(found.exception, InputError)
    assert words in str(found.exception)


def test_blanks_are_filled_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    found = run("infill", "Return a ___{3} of the ___ given.", "--json", "--trace-out", str(page), "-n", "5")
    assert found.exit_code == 0, found.output
    kept = json.loads(found.stdout)
    assert kept["text"].startswith("Return a ")
    assert kept["text"].endswith(" given.")
    assert kept["holes"] == 8 == sum(kept["accepted"])
    assert kept["evaluations"] <= 8
    assert "<html" in page.read_text()
    again = run("infill", "-", "--json", "-n", "5", text="Return a ___{3} of the ___ given.")
    assert json.loads(again.stdout)["token_ids"] == kept["token_ids"], "the seed decides"


def test_a_blank_becomes_as_many_masks_as_it_says() -> None:
    _, tokenizer = load_any_subset()
    ids = with_holes("a ___{2}b____", tokenizer, 3, 0)
    assert ids == [*tokenizer("a ")["input_ids"], 0, 0, *tokenizer("b")["input_ids"], 0, 0, 0]
    with pytest.raises(InputError, match="tokens: a blank of 0"):
        with_holes("a ___{0}", tokenizer, 3, 0)


def test_infilling_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    refused("infill", "nothing to fill", words="text: no blank")
    refused("infill", "___", words="every one is a hole")
    refused("infill", "a ___{200}", words="reads 1 to 128")
    refused("infill", "a ___", "--draft", "other", words="draft: there is no 'other'")
    refused("infill", "a ___", "-k", "0", words="k: 0")
    refused("infill", "a ___", "--model", str(tmp_path), words="holds no any-subset model")
    refused("infill", "a ___", "--trace-out", "x.txt", words="must end in .html or .json")


def test_diffusion_writes_with_and_without_a_guide(tmp_path: Path) -> None:
    page = tmp_path / "trace.json"
    guided = run("diffuse", "583+764=", "--json", "--trace-out", str(page))
    assert guided.exit_code == 0, guided.output
    kept = json.loads(guided.stdout)
    assert len(kept["token_ids"]) == 32
    assert kept["steps"] <= 32
    assert kept["guide_calls"] > 0
    assert len(json.loads(page.read_text())["tokens"]) == 32
    alone = json.loads(
        run("diffuse", "583+764=", "--no-guide", "--steps", "8", "--cache", "prompt", "--json").stdout
    )
    assert alone["unmasked_per_step"] == [4] * 8
    assert alone["guide_calls"] == 0
    streamed = run("diffuse", "-", "-n", "8", text="Return the ")
    assert streamed.exit_code == 0
    assert streamed.stdout.startswith("Return the ")


def test_diffusion_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    refused("diffuse", "", words="prompt: empty")
    refused("diffuse", "1+1=", "--steps", "4", words="steps: the guide decides")
    refused("diffuse", "1+1=", "--cache", "other", words="policy: there is no 'other'")
    refused("diffuse", "1+1=", "--rule", "other", words="rule: there is no 'other'")
    refused("diffuse", "1+1=", "-n", "0", words="length: 0")
    refused("diffuse", "1+1=", "--no-guide", "--steps", "33", words="steps: 33")
    refused("diffuse", "1+1=", "--model", str(tmp_path), words="holds no models")
    refused("diffuse", "1+1=", "--trace-out", "x.txt", words="must end in .html or .json")
