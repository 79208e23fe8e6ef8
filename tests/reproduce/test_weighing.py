"""Texts weighed as another policy would write them: estimates against exact expectations, on made-up texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tokenworks.align.reading import Batch
from tokenworks.reproduce.preferring import Remembered, efficiency, matched_divergence, matched_entropy, word_auc
from tokenworks.reproduce.weighing import HeldOut

SAMPLES = 4
EVERY = np.arange(30)


class Made(HeldOut):
    """Openings whose reference draws reward 0 or 1 evenly, half of the samples each; no model is read."""

    def __init__(self, openings: int = 30) -> None:
        self.prompts = [str(number) for number in range(openings)]
        self.rewards = np.tile([0.0, 1.0, 0.0, 1.0], (openings, 1))

    @property
    def _pair_of(self) -> Any:
        """The last ten openings have no pair."""
        return np.where(EVERY < 20, EVERY, -1)


def policy(good: float, divergence: float = 0.1, entropy: float = 3.0) -> dict[str, list[float]]:
    """One that writes reward 1 with the chance `good`."""
    row = [math.log(2 * (1 - good)), math.log(2 * good)] * 2
    return {
        "log_weight": row * 30, "kl": [divergence] * 120, "reverse_kl": [divergence] * 120,
        "entropy": [entropy] * 120, "chosen_kl": [0.3] * 20, "rejected_kl": [0.1] * 20,
        "margin": [1.0] * 15 + [-1.0] * 5,
    }  # fmt: skip


def test_means_are_the_policys() -> None:
    texts = Made()
    for good in (0.1, 0.5, 0.9):
        assert texts.mean([policy(good)], "reward") == pytest.approx(good)
    assert texts.mean([policy(0.2), policy(0.6)], "reward") == pytest.approx(0.4)
    assert texts.mean([policy(0.9, 0.7)], "reverse_kl") == pytest.approx(0.7)
    assert texts.mean([policy(0.9)], "accuracy") == pytest.approx(0.75)
    assert texts.mean([policy(0.9)], "gap") == pytest.approx(0.2)
    assert texts.effective(policy(0.5)) == pytest.approx(120)
    assert texts.effective(policy(0.9)) == pytest.approx(120 / (4 * (0.1**2 + 0.9**2) / 2))


def test_differences_are_paired() -> None:
    """Openings that are alike leave nothing to chance, seeds that differ alike neither."""
    texts = Made()
    ours, theirs = [policy(0.7), policy(0.8)], [policy(0.6), policy(0.7)]
    found = texts.difference(ours, theirs, "reward")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    unlike = texts.difference([policy(0.9), policy(0.6)], theirs, "reward")
    assert unlike.low == pytest.approx(-0.1)
    assert unlike.high == pytest.approx(0.3)


def test_win_rates_are_of_two_texts() -> None:
    """Of a text of each policy, a text of the sample never standing for both."""
    texts = Made()
    assert texts.win_rate([policy(0.7)], [policy(0.7)]).value == pytest.approx(0.5)
    a, b = 0.8, 0.6
    # Of two texts of one opening one is at hand twice as often with the other reward, as no text meets itself.
    same, other = (a * b + (1 - a) * (1 - b)) * 0.5, (a * (1 - b), (1 - a) * b)
    expected = (other[0] + same / 2) / (same + sum(other))
    assert texts.win_rate([policy(a)], [policy(b)]).value == pytest.approx(expected)
    assert expected > 0.5


def test_frontiers_are_matched() -> None:
    texts = Made()
    one, two = policy(0.6, 0.1, 3.2), policy(0.7, 0.4, 2.8)
    assert efficiency(texts, [one], EVERY) == pytest.approx(0.1 / math.sqrt(0.1))
    # Twice as far: twice the gain, four times the divergence.
    assert matched_divergence(texts, [two], [one]).value == pytest.approx(1)
    reference = policy(0.5, 0.0, 3.6)
    assert matched_entropy(texts, [two], [one], reference).value == pytest.approx(2.8 - (3.6 - 2 * 0.4))


def test_words_are_found_or_not() -> None:
    positive = [[True, False, False], [False, True, False]]
    assert word_auc([[3, 1, 2], [0, 9, 1]], positive).value == 1
    assert word_auc([[1, 1, 1], [1, 1, 1]], positive).value == 0.5
    # A second seed that is wrong about every response, and scores that are taken off.
    both = word_auc([[3, 1, 2], [0, 9, 1], [1, 3, 2], [9, 0, 1]], positive)
    assert both.low <= both.value < 1
    assert word_auc([[3, 1, 2], [0, 9, 1]], positive, [[1, 1, 1], [1, 1, 1]]).value == 0.5


def test_scores_are_computed_once_and_stand_at_their_tokens() -> None:
    calls = []

    def score(batch: Batch) -> torch.Tensor:
        calls.append(len(batch.mask))
        return batch.labels.float() * batch.mask

    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    ids = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 0, 0]])
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    remembered = Remembered(score)
    first = remembered(Batch(ids, attention, mask))
    assert first.tolist() == [[0, 3, 4, 0], [0, 7, 0, 0]]
    # In another order, and with less padding.
    again = remembered(Batch(ids.flip(0)[:, :4], attention.flip(0)[:, :4], mask.flip(0)[:, :3]))
    assert again.tolist() == [[0, 7, 0], [0, 3, 4]]
    assert calls == [2]
