"""Results: verdicts follow from intervals; ledgers resume; every reproduction is reachable by its slug."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenworks.core.catalog import load_catalog
from tokenworks.core.data import prompts
from tokenworks.core.errors import InputError
from tokenworks.reproduce import Run, available, reproduce
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import CONFIRMED, NOT_CONFIRMED, REFUTED, Figure, Result
from tokenworks.reproduce.token_recycling import DETAILED, ORDER, _figures, _table


def figure(low: float, high: float, headline: bool = True) -> Figure:
    return Figure("speed", "times", (low + high) / 2, (low, high), 1.2, 1.0, ours=1.0, headline=headline)


def result(*figures: Figure) -> Result:
    return Result("token-recycling", "faster", list(figures), [0], 1.0, "smollm2-135m")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.2, 1.4, CONFIRMED), (1.19, 1.4, NOT_CONFIRMED), (0.8, 1.0, NOT_CONFIRMED), (0.7, 0.99, REFUTED)],
)
def test_the_verdict_follows_from_the_interval(low: float, high: float, verdict: str) -> None:
    assert figure(low, high).verdict == verdict


def test_a_result_is_as_good_as_its_headline_figures() -> None:
    good, open_, bad = figure(1.3, 1.4), figure(1.0, 1.4), figure(0.5, 0.6)
    assert result(good, good).verdict == CONFIRMED
    assert result(good, open_).verdict == NOT_CONFIRMED
    assert result(good, open_, bad).verdict == REFUTED
    assert result(good, figure(0.5, 0.6, headline=False)).verdict == CONFIRMED
    with pytest.raises(ValueError, match="no headline"):
        _ = result(figure(1, 2, headline=False)).verdict


def test_figures_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="above high"):
        figure(2, 1)
    with pytest.raises(ValueError, match="refute_below"):
        Figure("x", "", 1, (1, 1), confirm_at=1.0, refute_below=2.0, ours=1)


def test_results_round_trip_and_a_typed_in_verdict_is_ignored(tmp_path: Path) -> None:
    before = result(figure(1.3, 1.4))
    before.save(tmp_path / "r.json")
    assert Result.load(tmp_path / "r.json") == before
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["verdict"] == CONFIRMED
    data["verdict"] = data["figures"][0]["verdict"] = REFUTED
    assert Result.from_dict(data).verdict == CONFIRMED


def test_a_ledger_takes_up_where_a_run_was_cut_off(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"n": 1})
    assert ledger.once("a", lambda: {"x": 1}) == {"x": 1}
    with pytest.raises(KeyboardInterrupt):
        ledger.once("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with next(tmp_path.glob("*/pieces.jsonl")).open("a") as out:
        out.write('{"key": "b", "val')  # cut off in the middle of a line
    again = Ledger(tmp_path, {"n": 1})
    assert "a" in again
    assert again.once("a", lambda: pytest.fail("done before")) == {"x": 1}
    assert again.once("b", lambda: 2) == 2
    assert "a" not in Ledger(tmp_path, {"n": 2})
    again.close()
    assert "a" not in Ledger(tmp_path, {"n": 1})


def pieces(speed: float) -> list:
    """Two prompts decoded in all six ways, ours `speed` times as fast as the others."""
    found = []
    for prompt in prompts(limit=2):
        methods = {
            name: {
                "seconds": 1.0 if name in ("generate", "lookup", "plain") else 1 / speed,
                "token_ids": list(range(12)),
                "passes": 12 if name in ("generate", "lookup", "plain") else 5,
                "accepted": [3, 3, 3, 3] if name.startswith(("tree", "fitted")) else [1] * 11,
            }
            for name in ORDER
        }
        found.append((prompt, {"methods": methods}))
    return found


def test_figures_are_computed_from_the_pieces() -> None:
    figures = {f.name: f for f in _figures(pieces(2.0), 1_500_000)}
    assert figures["Mean accepted tokens, published tree"].value == 3
    assert figures["Tokens a pass against prompt lookup"].value == pytest.approx(12 / 5)
    assert figures["Speed of the fitted tree against plain"].value == pytest.approx(2)
    assert figures["Speed of the fitted tree against plain"].verdict == CONFIRMED
    slow = {f.name: f for f in _figures(pieces(0.5), 1_500_000)}
    assert slow["Speed of the fitted tree against plain"].verdict == REFUTED
    broken = pieces(2.0)
    broken[0][1]["methods"]["fitted"]["token_ids"] = [99]
    changed = {f.name: f for f in _figures(broken, 1_500_000)}
    assert changed["Prompts with the words of plain decoding"].verdict == REFUTED


def test_the_table_has_a_row_for_every_method_and_kind() -> None:
    rows = _table(pieces(2.0))
    assert len(rows) == len(ORDER) + 2 * len(DETAILED)
    assert len({tuple(row) for row in rows}) == 1


def test_every_reproduction_is_reachable_and_bad_input_is_named(tmp_path: Path) -> None:
    assert "token-recycling" in available()
    with pytest.raises(InputError, match="no paper 'nope'"):
        reproduce("nope", Run(1, True, tmp_path))
    planned = next(paper.slug for paper in load_catalog().values() if paper.status == "planned")
    with pytest.raises(InputError, match="no reproduction yet"):
        reproduce(planned, Run(1, True, tmp_path))
    with pytest.raises(InputError, match="seeds: 0"):
        reproduce("token-recycling", Run(0, True, tmp_path))
