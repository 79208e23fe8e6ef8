"""`tokenworks align` as a stranger uses it: training, going on, explaining, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.inside import Done, call
from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, pairs for it, and a config."""
    path = tmp_path_factory.mktemp("align")
    tiny_model("llama", vocab_size=257).save_pretrained(path / "model")
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(path / "model")
    rows = [{"prompt": "ab", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "broken.jsonl").write_text(json.dumps(rows[0]) + "\n{not json\n" + json.dumps(rows[1]) + "\n")
    (path / "config.yaml").write_text("max_steps: 2\nper_device_train_batch_size: 2\nlearning_rate: 1.0e-3\n")
    return path


def train(folder: Path, method: str, out: Path, *more: str) -> Done:
    return call(
        "align", method, "--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"),
        "--out", str(out), "--config", str(folder / "config.yaml"), *more,
    )  # fmt: skip


def test_training_writes_a_model_and_goes_on(folder: Path, tmp_path: Path) -> None:
    done = train(folder, "tdpo", tmp_path / "out", "--alpha", "0.3")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["steps"] == 2
    assert {"loss", "rewards/margins", "rewards/accuracies"} <= set(found)
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = train(folder, "tdpo", tmp_path / "out", "--alpha", "0.3")
    assert again.returncode == 0, again.stderr[-2000:]
    written = call("generate", "abc", "--raw", "-m", str(tmp_path / "out"), "-n", "4", "--json")
    assert written.returncode == 0, written.stderr


@pytest.mark.parametrize(
    ("method", "more"),
    [("sparsepo", ("--mask", "activations", "--lora-rank", "2")), ("tgdpo", ("--guide", "{model}"))],
)
def test_methods_that_need_more(method: str, more: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    filled = [part.format(model=folder / "model") for part in more]
    done = train(folder, method, tmp_path / "out", *filled)
    assert done.returncode == 0, done.stderr[-2000:]


def test_distilling_off_policy(folder: Path, tmp_path: Path) -> None:
    model = str(folder / "model")
    done = train(folder, "aligndistil", tmp_path / "out", "--dpo", model, "--reverse", model, "--off-policy")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 2


def test_ppo_with_a_reward_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "def short(prompts, completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    (tmp_path / "c.yaml").write_text("max_steps: 1\nper_device_train_batch_size: 2\nmax_completion_length: 4\n")
    for more in ((), ("--dpo", str(folder / "model"))):
        done = call(
            "align", "rto", "--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"),
            "--out", str(tmp_path / f"out{len(more)}"), "--config", str(tmp_path / "c.yaml"),
            "--reward", f"{tmp_path / 'judge.py'}:short", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["reward"] < 0


def test_a_reward_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("x = 1\n")
    for named, words in (
        ("none.py:f", "neither sentiment nor"),
        (f"{tmp_path / 'judge.py'}:f", "no function 'f'"),
    ):
        done = call("align", "rto", "-d", "sentiment", "-o", str(tmp_path / "o"), "--reward", named)
        assert done.returncode == 2
        assert words in done.stderr


def test_searching(folder: Path) -> None:
    model = str(folder / "model")
    done = call("align", "search", "ab", "--raw", "-m", model, "--beams", "3", "-n", "4")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    done = call(
        "align", "search", "ab", "--raw", "-m", model, "--ref-model", model, "--scorer", "implicit", "-n", "3",
        "--simulations", "20", "--trace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reward: beta log(policy / reference)" in done.stdout
    done = call("align", "search", "ab", "--raw", "-m", model, "--scorer", "implicit")
    assert done.returncode == 2
    assert "reference: scorer" in done.stderr


def test_explaining_shows_and_keeps_both_sides(folder: Path, tmp_path: Path) -> None:
    model = str(folder / "model")
    done = call(
        "align", "explain", "sparsepo", "-p", "ab", "--chosen", "good", "--rejected", "bad one", "-m", model,
        "--ref-model", model, "--trace-out", str(tmp_path / "t.html"), "--channel", "reward mask",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chosen:" in done.stdout
    assert "rejected:" in done.stdout
    assert (tmp_path / "t-chosen.html").exists()
    assert (tmp_path / "t-rejected.html").exists()


def test_a_users_mistake_gives_one_line(folder: Path, tmp_path: Path) -> None:
    model, out = str(folder / "model"), str(tmp_path / "out")
    (tmp_path / "odd.yaml").write_text("learning_rat: 3\n")
    (tmp_path / "twice.yaml").write_text("output_dir: elsewhere\n")
    cases = [
        (["align", "tdpo", "-d", str(folder / "broken.jsonl"), "-o", out, "-m", model], "line 2: broken JSON"),
        (["align", "tdpo", "-d", "none.jsonl", "-o", out, "-m", model], "there is no file none.jsonl"),
        (["align", "tdpo", "-d", "sentiment", "-o", out, "-m", model, "--beta", "0"], "beta: 0.0 is not"),
        (["align", "tdpo", "-d", "sentiment", "-o", out, "-m", model, "--config", str(tmp_path / "odd.yaml")],
         "config: no training argument 'learning_rat'; is it learning_rate?"),
        (["align", "tdpo", "-d", "sentiment", "-o", out, "-m", model, "--config", str(tmp_path / "twice.yaml")],
         "output_dir is given by --out"),
        (["align", "explain", "tgdpo", "-p", "a", "--chosen", "b", "--rejected", "c", "-m", model, "--ref-model",
          model], "guide: tgdpo needs it"),
        (["align", "explain", "dpo", "-p", "a", "--chosen", "b", "--rejected", "b", "-m", model, "--ref-model",
          model], "the same as the chosen"),
    ]  # fmt: skip
    for arguments, words in cases:
        done = call(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr, done.stderr


def test_broken_lines_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    done = call(
        "align", "dpo", "-d", str(folder / "broken.jsonl"), "-o", str(tmp_path / "out"), "-m",
        str(folder / "model"), "--config", str(folder / "config.yaml"), "--skip-bad",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
