"""`tokenworks bench`, `tokenworks train` and pairs in `tokenworks generate`, as a stranger uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.cli.test_main import run
from tests.conftest import tiny_model
from tests.core.test_trace import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    assert len(AutoTokenizer.from_pretrained(path)) == 256
    return path


def test_any_drafter_with_any_verifier_that_fits(folder: Path) -> None:
    common = ["generate", "abc", "-m", str(folder), "-n", "12", "--json"]
    plain = json.loads(run(*common, "--method", "autoregressive").stdout)
    pair = ["--draft", "rsd-s", "--verify", "token-matching", "--draft-model", str(folder)]
    mixed = run(*common, *pair)
    assert mixed.returncode == 0, mixed.stderr
    found = json.loads(mixed.stdout)
    assert found["token_ids"] == plain["token_ids"]
    assert (found["draft"], found["verify"]) == ("rsd-s", "token-matching")
    assert found["target_passes"] < plain["target_passes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "rsd-s", "--verify", "k-seq", "--draft-model", "FOLDER"], "k-seq is not exact for rsd-s"),
        (["--draft", "magic"], "draft: no drafter 'magic'"),
        (["--verify", "magic"], "verify: no verifier 'magic'"),
        (["--method", "spectr"], "draft-model: draft-smollm2-135m was made for another target"),
        (["--method", "spectr", "--draft-model", "nowhere"], "model: there is no 'nowhere'"),
    ],
)
def test_pairs_that_cannot_be_are_refused_in_one_line(folder: Path, arguments: list[str], message: str) -> None:
    given = [str(folder) if part == "FOLDER" else part for part in arguments]
    done = run("generate", "abc", "-m", str(folder), "-n", "4", *given)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_measures_the_users_own_prompts(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("abc\nhello there\n")
    plot = tmp_path / "plot.svg"
    model = ["-m", str(folder), "--draft-model", str(folder)]
    done = run("bench", "decode", "-p", str(prompts), *model, "-n", "8", "--plot", str(plot), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {"autoregressive", "rsd-s", "dyspec", "token-recycling"} <= {row["draft"] for row in rows}
    assert all(row["same_words"] == 1 for row in rows)
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.txt"], "plot: x.txt must end in .png"),
        (["--limit", "1"], "limit: 1 prompts are too few"),
        (["--prompts", "nowhere.txt"], "source: there is no file nowhere.txt"),
    ],
)
def test_bench_refuses_in_one_line(arguments: list[str], message: str) -> None:
    done = run("bench", "decode", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_train_draft_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    bad = run("train", "draft", "-o", str(tmp_path / "draft"), "-m", str(folder), "--layers", "first")
    assert bad.returncode == 2
    assert "layers: 'first' is not a list of numbers" in bad.stderr
