"""The reproduction of AdaDec: its tasks are fair, and figures follow from counts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.models import LoadedModel
from tokenworks.decode.adadec_threshold import EntropyThreshold
from tokenworks.reproduce import Run, adadec
from tokenworks.reproduce.adadec import ALWAYS, BEAM, GREEDY, OURS, RANDOM
from tokenworks.reproduce.code_tasks import SPLITS, library_functions, library_lines, tasks
from tokenworks.reproduce.result import CONFIRMED, NOT_CONFIRMED, REFUTED


def test_every_reference_passes_and_an_empty_body_does_not() -> None:
    everything = [task for split in SPLITS for task in tasks(split)]
    assert len({task.id for task in everything}) == len(everything) == 98
    assert [len(tasks(split)) for split in SPLITS] == [19, 79]
    for task in everything:
        assert task.prompt.startswith(f"def {task.id}(")
        assert task.prompt.endswith('"""')
        assert 3 <= task.tests.count("assert") <= 6
        outcome = task.judge(task.solution)
        assert outcome.passed, f"{task.id}: {outcome.message}"
    for task in everything[::8]:
        assert not task.judge("\n    pass\n").passed


def test_library_functions_are_whole_and_in_one_half_only() -> None:
    halves = {split: library_functions(split, 60) for split in SPLITS}
    modules = [{function.id.split(":")[0] for function in halves[split]} for split in SPLITS]
    assert not modules[0] & modules[1]
    for function in halves["test"]:
        (node,) = ast.parse(function.prompt + function.body).body
        assert isinstance(node, ast.FunctionDef | ast.Expr | ast.AsyncFunctionDef)
        assert ast.get_docstring(node)  # type: ignore[arg-type]
        assert ast.parse(function.prompt).body, "the docstring is whole"
    assert library_functions("test", 60) == halves["test"]


def test_lines_are_cut_from_their_functions() -> None:
    functions = {function.id: function for function in library_functions("test", 60)}
    found = library_lines(functions.values())
    assert len(found) > 50
    for place in found:
        whole = functions[place.id].prompt + functions[place.id].body
        assert whole.startswith(place.prompt + place.rest + "\n")
        assert len(place.prompt) > len(functions[place.id].prompt), "it is in the body"
        assert place.rest.startswith(" ")
        assert len(place.rest.strip()) >= 3
        assert place.prompt.split("\n")[-1].strip(), "the line has begun"


def row(item: str, method: str, right: float, seconds: float = 1.0, name: str = "") -> dict[str, Any]:
    counts = {"tokens": 10, "passes": 10 * seconds, "nodes": 10, "seconds": seconds, "pauses": 2}
    return {"item": item, "method": method, "name": name or method, "right": right, **counts}


def rows(better: int, worse: int, of: int = 40, beam_seconds: float = 3.0) -> list[dict[str, Any]]:
    """Items of which AdaDec gained and lost some against greedy decoding."""
    made = []
    for number in range(of):
        ours, greedy = float(number < better), float(better <= number < better + worse)
        item = str(number)
        made += [row(item, OURS, ours, 2.0), row(item, GREEDY, greedy), row(item, BEAM, greedy, beam_seconds)]
        made += [row(item, ALWAYS, ours, 5.0)]
        made += [row(item, RANDOM, greedy, 2.0, f"{RANDOM} {seed}") for seed in range(2)]
    return made


READ = [{"entropies": [0.1, 0.2, 2.0, 2.5, 3.0, 0.3], "ranks": [1, 1, 2, 1, 9, 1]}] * 4


@pytest.mark.parametrize(
    ("better", "worse", "seconds", "verdict"),
    [(30, 0, 3.0, CONFIRMED), (0, 30, 3.0, REFUTED), (3, 3, 3.0, NOT_CONFIRMED), (30, 0, 1.0, REFUTED)],
)
def test_verdicts_follow_from_the_counts(better: int, worse: int, seconds: float, verdict: str) -> None:
    pieces = {"functions": rows(better, worse, beam_seconds=seconds), "lines": rows(better, worse)}
    found = adadec._figures(pieces, READ, 1.9)
    by_name = {figure.name: figure for figure in found}
    verdicts = [figure.verdict for figure in found if figure.headline]
    assert len(verdicts) == 4
    overall = CONFIRMED if set(verdicts) == {CONFIRMED} else REFUTED if REFUTED in verdicts else NOT_CONFIRMED
    assert overall == verdict
    gain = by_name["More lines word for word than greedy by"]
    assert gain.value == pytest.approx((better - worse) / 40)
    assert by_name["Fewer seconds than beam search, functions"].value == pytest.approx(seconds / 2)
    assert by_name["Of errors at pauses, second or third choice is right in"].value == pytest.approx(0.5)
    assert by_name["Entropy tells right from wrong (AUC)"].value == pytest.approx(7 / 8)


def test_rows_count_what_was_gained_and_lost() -> None:
    made = adadec._row("lines", OURS, rows(6, 1))
    assert (made["gained"], made["lost"], made["right"]) == (6, 1, 0.15)
    assert made["McNemar p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert (made["pause rate"], made["passes a token"]) == (0.2, 2.0)
    assert adadec._row("lines", RANDOM, rows(6, 1))["gained"] == 0
    assert adadec._rate(rows(1, 1)) == pytest.approx(0.2)


def test_a_run_goes_through_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe([task.prompt + task.solution for task in tasks("calibration")], 400)
    model = tiny_model("llama", vocab_size=400, max_position_embeddings=4096)
    learned = EntropyThreshold(2.0, 0.5, -2.0, 3.0, 0.9, 0.8, 100, 0.7, 0.2, 0.4, "tiny", "float32")
    monkeypatch.setattr(adadec, "load", lambda name: LoadedModel(model, tokenizer, "tiny", "here"))
    monkeypatch.setattr(adadec, "calibrate", lambda loaded, functions: learned)
    monkeypatch.setattr(adadec._Bench, "read", lambda *a: READ[0])  # a random model is never right
    monkeypatch.setattr(adadec, "FUNCTION_TOKENS", 6)
    monkeypatch.setattr(adadec, "LINE_TOKENS", 4)

    class Cut(Exception):
        pass

    def cut(done: int, total: int, what: str) -> None:
        if done == total - 1 and total > 1:
            raise Cut

    with pytest.raises(Cut):
        adadec.run(Run(1, True, tmp_path, cut))
    (pieces,) = tmp_path.glob("unfinished/*/*/pieces.jsonl")
    before = len(pieces.read_text().splitlines())
    assert before == 1 + (6 + 8) * 5 + 5
    measured: list[str] = []
    monkeypatch.setattr(adadec._Bench, "measure", lambda *a: measured.append("again"))
    result = adadec.run(Run(1, True, tmp_path))
    assert not measured, "what was done is not done again"
    assert not list(tmp_path.glob("unfinished/*/*"))
    assert [(row["what"], row["method"]) for row in result.table[:2]] == [
        ("functions", GREEDY),
        ("functions", BEAM),
    ]
    assert next(r for r in result.table if r["method"] == ALWAYS)["pause rate"] == 1
    assert result.traces[0]["meta"]["title"].startswith("AdaDec: where it paused")
    assert result.series[0]["lines"][0]["y"]
    assert result.verdict
