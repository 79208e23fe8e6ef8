"""RTO's figures from made-up runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenworks.reproduce import rto
from tokenworks.reproduce.ppo import SMOOTH, TEXTS, curve, texts_needed
from tokenworks.reproduce.preferring import shuffle
from tokenworks.reproduce.result import CONFIRMED, REFUTED
from tokenworks.reproduce.rto_sentiment import Found

SLOW, FAST = [0.1 * n for n in range(20)], [1.9] * 20
"""Rewards by round; the last five of SLOW have a mean of 1.7."""


def test_texts_needed() -> None:
    assert texts_needed(SLOW, 1.7) == 20 * TEXTS
    assert texts_needed(FAST, 1.7) == SMOOTH * TEXTS
    assert texts_needed(SLOW, 1.8) == 40 * TEXTS, "never reached"


@pytest.mark.parametrize(("ours", "verdict"), [(FAST, CONFIRMED), ([0.0] * 20, REFUTED)])
def test_the_verdict(ours: list[float], verdict: str) -> None:
    def runs(rewards: list[float]) -> list[dict[str, Any]]:
        return [{"rewards": rewards, "reward": rewards[-1]}] * 3

    found = {way: runs(SLOW) for way in rto.WAYS} | {"RTO": runs(ours)}
    figures = rto._figures(found)
    assert {figure.verdict for figure in figures if figure.headline} == {verdict}
    assert figures[0].baseline == 20 * TEXTS
    plot = curve({**found, "PPO, twice the texts": runs(SLOW)}, "title", "unit")
    assert plot["lines"][0]["x"][0] == SMOOTH * TEXTS
    assert plot["lines"][-1]["x"][0] == 2 * SMOOTH * TEXTS


def test_smollm2_stands_beside_the_verdict() -> None:
    def runs(rewards: list[float], reward: float) -> list[dict[str, Any]]:
        numbers = {name: [1.0] * 6 for name in ("kl", "tokens", "distinct")}
        return [{"rewards": rewards, "reward": [reward + 0.01 * n for n in range(6)], **numbers}] * 3

    found = Found({"PPO": runs(SLOW, 0.2), "RTO": runs(FAST, 0.5)})
    faster, gain = found.figures()
    assert (faster.value, faster.verdict, faster.headline) == (20 / SMOOTH, CONFIRMED, False)
    assert (gain.value, gain.verdict) == (pytest.approx(0.3), CONFIRMED)
    assert [row["method"] for row in found.rows()] == ["SmolLM2, PPO", "SmolLM2, RTO"]
    assert set(found.rows()[0]) == {"method", "reward", "kl", "length", "distinct"}
    assert len(found.series()) == 1
    nothing = Found({})
    assert nothing.figures() == nothing.rows() == nothing.series() == []


def test_shuffled_rewards_stay_in_their_text() -> None:
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    values = torch.arange(18.0).view(2, 9) * mask
    found = shuffle(values, mask, torch.Generator().manual_seed(0))
    assert not torch.equal(found, values)
    torch.testing.assert_close(found.sort(1).values, values.sort(1).values)
    assert not found[1, 4:].any()
