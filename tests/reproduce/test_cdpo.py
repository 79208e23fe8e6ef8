"""cDPO's figures from made-up chains, and what its lessons shuffle."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.align.made_up import random_pairs
from tokenworks.align.dpo import DPO
from tokenworks.reproduce import cdpo, hand_checked, lessons
from tokenworks.reproduce.result import CONFIRMED, NOT_CONFIRMED, REFUTED

CHAINS, TOKENS = 6, 5


def chains() -> list[dict[str, Any]]:
    """Each lost at another token; a token that is replaced there saves most, one elsewhere few."""
    return [
        {"ids": list(range(TOKENS)), "index": row % TOKENS, "wrong": row % TOKENS, "scores": [32] * TOKENS,
         "critical": {"kept": 0, "replaced": 40 + row}, "elsewhere": {"kept": 0, "replaced": row}}
        for row in range(CHAINS)
    ]  # fmt: skip


def detected(truth: list[dict[str, Any]], best: str) -> dict[str, Any]:
    """Only the detector `best` knows."""
    rng = random.Random(0)
    suspicion = {
        name: [
            [float(place == piece["index"]) if name == best else rng.random() for place in range(TOKENS)]
            for piece in truth
        ]
        for name in lessons.DETECTORS
    }
    return {"suspicion": suspicion}


@pytest.mark.parametrize(("best", "verdict"), [("contrastive", CONFIRMED), ("surprise", REFUTED)])
def test_who_finds_the_critical_token(best: str, verdict: str) -> None:
    truth = chains()
    figures = cdpo._detection(truth, [detected(truth, best)] * 2)
    by_name = {figure.name: figure for figure in figures}
    assert by_name["AUC for the critical tokens by rollouts, contrastive less surprise"].verdict == verdict
    assert sum(figure.headline for figure in figures) == len(lessons.DETECTORS) - 1
    hits = by_name["Critical tokens that the most suspect token hits"]
    assert (hits.value == 1) == (best == "contrastive")


def test_what_another_token_saves() -> None:
    kept, elsewhere, share = cdpo._replacement(chains())
    assert (kept.verdict, elsewhere.verdict, share.value) == (CONFIRMED, CONFIRMED, 1)
    assert kept.ours > 0.99
    assert elsewhere.baseline is not None
    assert kept.baseline == 0 < elsewhere.baseline < kept.ours
    plot = cdpo._pass_plot(chains())
    assert plot["lines"][0]["name"] == "critical token replaced"
    assert plot["lines"][1]["y"] == [0] * len(cdpo.KS)


@pytest.mark.parametrize(
    ("ours", "verdict"), [([1.0, 1.0], CONFIRMED), ([0.0, 0.0], REFUTED), ([0.0, 1.0], NOT_CONFIRMED)]
)
def test_what_training_wins(ours: list[float], verdict: str) -> None:
    """A tie is no win."""
    found = {name: [[0.0, 1.0] * 30] * 3 for name in lessons.METHODS} | {lessons.OURS: [ours * 30] * 3}
    figures = cdpo._training(found)
    assert {figure.verdict for figure in figures if figure.headline} == {verdict}
    table = cdpo._table([0.0, 1.0], found)
    assert table[0] == {
        "method": "untrained", "seeds": 1, "greedy accuracy": "0.500", "of each seed": "0.500",
    }  # fmt: skip


def test_marked_answers() -> None:
    """Each was marked once, is wrong, and the sum that its question asks for would be right."""
    for question, marked in hand_checked.MARKED:
        text, place = hand_checked.split(marked)
        assert marked.count("*") == 1
        assert marked[place + 1 :] == text[place:]
        assert not hand_checked.is_right(question, text)
        who, what, many, more = question
        assert hand_checked.is_right(question, f" {many} and {more}. {who} has {many + more} {what}.")
        assert f"{abs(more)} {'more' if more > 0 else 'away'}" in hand_checked.prompt(question)


@pytest.mark.parametrize(("best", "verdict"), [("contrastive", CONFIRMED), ("surprise", REFUTED)])
def test_marked_tokens_are_found_or_not(best: str, verdict: str) -> None:
    def chain(critical: int) -> dict[str, Any]:
        rows = {"contrastive": [0.5] * TOKENS, "surprise": [0.5] * TOKENS}
        rows[best] = [float(place == critical) for place in range(TOKENS)]
        return {"ids": [1] * TOKENS, "critical": critical, **rows}

    (figure,) = cdpo._marked({"chains": [chain(row % TOKENS) for row in range(10)]})
    assert (figure.verdict, figure.headline) == (verdict, False)
    assert cdpo._marked(None) == []


def test_shuffled_scores_keep_the_end() -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.9]
    found = lessons._shuffled(scores, random.Random(1))
    assert found != scores
    assert sorted(found) == scores
    assert found[-1] == 0.9


def test_rpo_is_dpo_with_a_likelihood() -> None:
    pairs = random_pairs()
    chosen = (pairs.log_p * pairs.mask).sum(1)[:3] / pairs.mask.sum(1)[:3]
    torch.testing.assert_close(lessons._RPO()(pairs).loss, DPO(lessons.BETA)(pairs).loss - chosen)
