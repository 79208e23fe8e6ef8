"""The command line as a stranger uses it: in a process of its own, with good and bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import tiny_model
from tests.core.test_trace import byte_tokenizer

COMMAND = [sys.executable, "-m", "tokenworks"]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer of one token a byte, as a local folder."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    assert len(AutoTokenizer.from_pretrained(path)) == 256
    return path


def test_generate_prints_one_json_object_with_the_promised_keys(folder: Path) -> None:
    texts = []
    for method in ("autoregressive", "token-recycling"):
        done = run(
            "generate", "abc", "--model", str(folder), "--method", method, "--max-new-tokens", "12",
            "--temperature", "0.0", "--seed", "3", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert {
            "text",
            "token_ids",
            "seconds",
            "tokens_per_second",
            "target_passes",
            "method",
            "model",
            "seed",
        } <= set(found)
        assert (found["method"], found["model"], found["seed"]) == (method, str(folder), 3)
        assert len(found["token_ids"]) == 12
        texts.append(found["token_ids"])
    assert texts[0] == texts[1]


def test_generate_streams_traces_and_reads_standard_input(folder: Path, tmp_path: Path) -> None:
    done = run(
        "generate",
        "-",
        "-m",
        str(folder),
        "-n",
        "8",
        "--trace",
        "--trace-out",
        str(tmp_path / "t.html"),
        input="abc",
    )
    assert done.returncode == 0, done.stderr
    assert "8 tokens in" in done.stderr
    assert "source: who proposed the token" in done.stdout
    assert (tmp_path / "t.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", ""], 2, "prompt: empty"),
        (["generate", "x", "--method", "nope"], 2, "no decoder 'nope'"),
        (["generate", "x", "--model", "smollm2-135"], 3, "Did you mean smollm2-135m"),
        (["generate", "x", "--model", "./none.gguf"], 3, "none.gguf"),
        (["generate", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "x", "--top-p", "2"], 2, "top_p"),
        (["generate", "x", "--trace-out", "t.txt"], 2, "must end in .html or .json"),
        (["reproduce"], 2, "slug"),
        (["reproduce", "token-recyclin"], 2, "Did you mean token-recycling"),
        (["papers", "--family", "nope"], 2, "family"),
        (["models", "--fetch", "nope"], 3, "no embedded model 'nope'"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_a_users_mistake_gives_one_line_and_an_exit_code(arguments: list[str], code: int, words: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_numbers_reach_the_user_as_a_line(folder: Path) -> None:
    for arguments, words in ((["-n", "0"], "max_new_tokens"), (["-n", "1", "--raw", "x" * 200], "")):
        done = run("generate", *([] if "--raw" in arguments else ["x"]), "--model", str(folder), *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_control_c_stops_cleanly(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=256, max_position_embeddings=50_000).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    command = [*COMMAND, "generate", "abc", "--raw", "-m", str(tmp_path), "-n", "49000", "-t", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_help_teaches_and_papers_and_models_list() -> None:
    for verb in ("generate", "papers", "models", "reproduce", "report"):
        done = run(verb, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout
    papers = json.loads(run("papers", "--json").stdout)
    assert len(papers) == 61
    assert {"slug", "title", "family", "status", "entry_point"} <= set(papers[0])
    assert {row["name"] for row in json.loads(run("models", "--json").stdout)} == {"smollm2-135m", "gemma-3-270m"}


def test_report_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    done = run("report", "--out", str(tmp_path / "r.html"), "--results", str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "tokenworks reproduce" in (tmp_path / "r.html").read_text()
