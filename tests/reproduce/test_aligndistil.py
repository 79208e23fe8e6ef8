"""AlignDistil's figures from made-up pieces, and its controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tokenworks.align.aligndistil import Composed
from tokenworks.align.vocabulary import Head
from tokenworks.reproduce import aligndistil
from tokenworks.reproduce.distilling import BETA0, EVERY, Shuffled
from tokenworks.reproduce.result import CONFIRMED, REFUTED

OPENINGS = 12
DRIFT = np.linspace(-0.05, 0.05, OPENINGS)


def measured(reward: float, kl: float) -> dict[str, list[float]]:
    return {
        "reward": list(reward + DRIFT), "kl": [kl] * OPENINGS, "distinct": [0.5] * OPENINGS,
        "tokens": [20.0] * OPENINGS,
    }  # fmt: skip


def pieces(ours: float) -> dict[str, list[dict[str, list[float]]]]:
    """DPO gains 0.2; twice its strength gains 0.4 at twice the distance."""
    found = {
        "reference": measured(0.0, 0.0), "DPO beta=0.1": measured(0.2, 1.0), "shuffled c=10": measured(0.3, 1.5),
        "contrast k=1": measured(0.4, 2.0), "contrast k=4": measured(0.8, 4.0),
        aligndistil.ADAPTIVE: measured(ours, 1.5),
    }  # fmt: skip
    return {name: [each] * 2 for name, each in found.items()}


@pytest.mark.parametrize(("ours", "verdict"), [(0.5, CONFIRMED), (0.1, REFUTED)])
def test_figures(ours: float, verdict: str) -> None:
    found = pieces(ours)
    figures = aligndistil._figures(found)
    assert [figure.verdict for figure in figures if figure.headline] == [verdict] * 3
    # The constant strengths have 0.3 at our distance.
    assert figures[2].value == pytest.approx(ours - 0.3)
    assert figures[2].baseline == pytest.approx(0.3)
    assert aligndistil._row("DPO", found["DPO beta=0.1"])["kl"] == 1.0
    plot = aligndistil._frontier(found)
    assert [line["name"] for line in plot["lines"]] == ["DPO", "contrast", "adaptive", "shuffled"]
    assert plot["lines"][1]["x"] == [2.0, 4.0]


def curve(*rewards: float) -> list[list[float]]:
    return [list(reward + DRIFT) for reward in rewards]


def test_speed() -> None:
    """0.18 is nine tenths of DPO's gain."""
    slow, fast = curve(0.05, 0.1, 0.15, 0.2), curve(0.19, 0.3, 0.3, 0.3)
    for ours, theirs, expected in ((fast, slow, CONFIRMED), (slow, fast, REFUTED), (slow, slow, None)):
        curves = {aligndistil.OURS: [ours] * 2, aligndistil.SAMPLED: [theirs] * 2}
        figure = aligndistil._speed(pieces(0.5), curves)
        assert expected is None or figure.verdict == expected
    assert figure.value == 1
    assert figure.ours == 4 * EVERY
    assert aligndistil.steps_needed(np.array([0.0, 0.1]), 0.2) == 4 * EVERY
    plot = aligndistil._plot(pieces(0.5), curves)
    assert plot["lines"][0]["x"] == [0, 3, 6, 9, 12]
    assert plot["lines"][0]["y"] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_strengths_and_words() -> None:
    strengths = {"alphas": [[0.1, 0.9, 0.2], [0.8, 0.1, 0.3]], "valued": [[0, 1, 0], [1, 0, 0]]}
    assert aligndistil._seen_by_alpha(strengths).value == 1


def test_shuffled_strengths_are_the_same_ones() -> None:
    """Of each response; the teacher at a token follows the strength that it got."""
    torch.manual_seed(0)
    head = Head(torch.randn(300, 8), None, None)
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, :150] = mask[1, 20:60] = True
    states: Any = [(head, torch.randn(190, 8)) for _ in range(2)]
    plain = Composed(*states, "aligndistil", 10, BETA0)
    rows = [plain(slice(start, start + 128)) for start in (0, 128)]
    shuffled = Shuffled(*states, 10, mask, 3)
    assert not torch.equal(shuffled.alpha, plain.alpha)
    for one, other in zip(shuffled.alpha.split([150, 40]), plain.alpha.split([150, 40]), strict=True):
        torch.testing.assert_close(one.sort().values, other.sort().values)
    torch.testing.assert_close(shuffled.alpha * shuffled.beta, torch.full((190,), BETA0))
    shuffled.alpha = plain.alpha
    torch.testing.assert_close(shuffled(slice(128, 256)), rows[1])
