"""`tokenworks generate` in its ways of writing: under a constraint, routed, paused, by bytes; what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.inside import call
from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model with a token for each byte, and an end of text."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=257, max_position_embeddings=512, eos_token_id=0).save_pretrained(folder)
    return str(folder)


def test_a_regular_expression_is_kept_to(model: str, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    done = call(
        "generate", "a date", "-m", model, "--regex", "[0-9]{4}-[0-9]{2}", "--json", "--seed", "3", "-n", "20",
        "--trace-out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", found["text"])
    assert found["particles"] == 5
    assert sum(found["posterior"].values()) == pytest.approx(1)
    assert found["log_evidence"] < 0
    assert {"forced", "wanted", "checks"} <= set(json.loads(out.read_text())["channels"])


def test_greedy_under_a_constraint_takes_one_particle(model: str) -> None:
    done = call("generate", "x", "-m", model, "--regex", "[ab]{3}", "--json", "-t", "0", "-n", "9")
    assert json.loads(done.stdout)["particles"] == 1


def test_schemas_and_grammars_come_from_files(model: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}},
                                                 "required": ["n"], "additionalProperties": False}))  # fmt: skip
    (tmp_path / "g.lark").write_text('start: ("yes" | "no") "!"')
    done = call("generate", "x", "-m", model, "--json-schema", str(tmp_path / "s.json"), "-n", "24")
    assert json.loads(done.stdout) in ({"n": 1}, {"n": 2})
    done = call("generate", "x", "-m", model, "--grammar", str(tmp_path / "g.lark"), "-n", "24", "--trace")
    assert done.stdout.splitlines()[0] in ("yes!", "no!")
    assert "forced: bits by which the constraint pulled" in done.stdout


def test_adadec_with_a_threshold_of_ones_own(model: str, tmp_path: Path) -> None:
    plain = call("generate", "abc", "-m", model, "-n", "8", "--json", "--method", "autoregressive")
    never = call("generate", "abc", "-m", model, "-n", "8", "--json", "--method", "adadec", "--threshold", "99")
    assert json.loads(never.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]
    always = call("generate", "abc", "-m", model, "-n", "8", "--trace", "--method", "adadec", "--threshold", "0")
    assert "paused at 100%" in always.stderr
    assert "decision: greedy: taken at once" in always.stdout


def test_a_threshold_is_learned_kept_and_used(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "reference": "abcabcabc" + "xyz" * (n % 3)} for n in range(12)]
    data, out = tmp_path / "p.jsonl", tmp_path / "t.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    done = call("train", "threshold", str(data), "--out", str(out), "-m", model)
    # A random model's entropy says nothing of what is right: either is an answer, and both are for users.
    if done.returncode == 0:
        assert json.loads(done.stdout)["file"] == str(out)
        assert call("generate", "a", "-m", model, "-n", "3", "--method", "adadec", "--threshold",
                    str(out)).returncode == 0  # fmt: skip
    else:
        assert done.stderr.startswith("tokenworks: ")


def test_bytes_and_an_ensemble(model: str) -> None:
    one = call("generate", "caf", "-m", model, "--raw", "--bytes", "-n", "6", "--json")
    both = call("generate", "caf", "-m", model, "--raw", "--bytes", "--ensemble", model, "-n", "6", "--json")
    assert json.loads(one.stdout)["text"] == json.loads(both.stdout)["text"]
    assert json.loads(one.stdout)["bits_per_byte"] == pytest.approx(json.loads(both.stdout)["bits_per_byte"])
    cut = call("generate", "-", "-m", model, "--raw", "--bytes", "-n", "1", given=b"caf\xc3")
    assert cut.returncode == 0, cut.stderr
    assert "1 bytes in" in cut.stderr


@pytest.mark.model
def test_routing_says_who_wrote_what() -> None:
    done = call("generate", "Name a river.", "--route", "--threshold", "0.5", "-n", "10", "--trace")
    assert done.returncode == 0, done.stderr
    assert "of them by the large model" in done.stderr
    assert "writer: which model wrote the token" in done.stdout
    alone = call("generate", "Name a river.", "--route", "--threshold", "2", "-n", "6", "--json")
    assert json.loads(alone.stdout)["large_share"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--regex", "a", "--route"], "regex and route: each is a way of writing of its own"),
        (["--regex", "a", "--grammar", "g"], "grammar: not together with --regex"),
        (["--bytes", "--method", "ppd"], "bytes and method"),
        (["--particles", "3"], "particles: it belongs to constraint"),
        (["--ensemble", "gemma-3-270m"], "ensemble: it belongs to bytes"),
        (["--threshold", "1"], "threshold: it belongs to route or adadec"),
        (["--json-schema", "none.json"], "json-schema: cannot read the file none.json"),
        (["--regex", "("], "regex: at 1"),
        (["--regex", "[a&&b]"], "regex: no text satisfies it"),
        (["--regex", "x{30}", "-n", "3"], "constraint: no text that satisfies it was found"),
        (["--method", "adadec", "--threshold", "much"], "threshold: 'much' is not a number"),
        (["--method", "adadec", "-t", "1"], "temperature: 1.0, but adadec is greedy"),
        (["--method", "adadec"], "threshold: none comes with tokenworks for"),
        (["--route"], "draft"),
    ],
)
def test_misuse(arguments: list[str], words: str, model: str) -> None:
    done = call("generate", "x", "-m", model, *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_broken_grammar_is_pointed_at(model: str, tmp_path: Path) -> None:
    (tmp_path / "g.lark").write_text('start: "a" (')
    done = call("generate", "x", "-m", model, "--grammar", str(tmp_path / "g.lark"))
    assert done.returncode == 2
    assert "grammar: 1(" in done.stderr


@pytest.mark.parametrize("more", [[], ["--bytes", "--raw"]])
def test_a_prompt_that_is_not_utf8(more: list[str], model: str) -> None:
    done = call("generate", "-", "-m", model, *more, given=b"abc\xff\xfe")
    assert done.returncode == 2
    assert "prompt: not UTF-8 (byte 0xff at 3)" in done.stderr
