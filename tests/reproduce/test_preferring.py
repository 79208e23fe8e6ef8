"""Figures of the three reproductions that are read by weighing, from made-up pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.align.made_up import LAYERS, WIDTH, random_pairs
from tests.reproduce.test_weighing import Made, policy
from tokenworks.align.sparsepo import SparsePO
from tokenworks.reproduce import sparsepo, tdpo, tgdpo
from tokenworks.reproduce.preferring import frontier, row
from tokenworks.reproduce.result import CONFIRMED, NOT_CONFIRMED, REFUTED, Figure


def verdicts(figures: list[Figure]) -> set[str]:
    return {figure.verdict for figure in figures if figure.headline}


def test_tdpo() -> None:
    """Ahead at equal reward, behind, and the same."""
    texts, reference = Made(), policy(0.5, 1e-9, 3.6)
    for divergence, entropy, expected in ((0.05, 3.3, CONFIRMED), (0.2, 2.7, REFUTED)):
        found = {
            ("DPO", 0.1): [policy(0.6, 0.1, 3.0)] * 3, ("TDPO1", 0.1): [policy(0.6, 0.1, 3.0)] * 3,
            ("TDPO2", 0.1): [policy(0.6, divergence, entropy)] * 3,
            ("DPO", 0.5): [policy(0.6, 0.1, 3.0)], ("TDPO2", 0.5): [policy(0.6, divergence, entropy)],
        }  # fmt: skip
        figures = tdpo._figures(texts, found, reference)
        assert verdicts(figures) == {expected}
        assert figures[-1].value == (expected == CONFIRMED)
        assert sum(figure.headline for figure in figures) == 2


def guides() -> list[dict[str, Any]]:
    one = {"rewards": [[0.2, 0.1, -0.1]] * 4, "right": [[True, False, False]] * 4, "alpha": 7.0}
    return [one | {"usual": [0.9, 1.1], "large": [0.0, 2.0]}] * 2


def test_tgdpo() -> None:
    texts = Made()
    for ours, expected in ((0.8, CONFIRMED), (0.55, REFUTED)):
        found = {name: [policy(0.6)] * 2 for name in tgdpo.METHODS} | {n: [policy(0.6)] for n in tgdpo.ONCE}
        found[tgdpo.LARGE] = [policy(ours)] * 2
        figures = tgdpo._figures(texts, found, guides())
        assert verdicts(figures) == {expected}
        words = next(figure for figure in figures if figure.unit == "AUC")
        assert (words.value, words.verdict) == (1, CONFIRMED)
    assert tgdpo._histogram(guides())["lines"][1]["x"] == [0.0, 2.0]


def test_sparsepo() -> None:
    texts = Made()
    words = [[True, False, False]] * 4
    for mask, expected in (
        ([0.9, 0.1, 0.0], CONFIRMED),
        ([0.1, 0.2, 0.3], REFUTED),
        ([0.1, 0.2, 0.0], NOT_CONFIRMED),
    ):
        piece = {"seen": policy(0.6), "mask": [mask] * 4, "moved": 0.1}
        found = {name: [piece] * 2 for name in sparsepo.SEEDED} | {name: [piece] for name in sparsepo.ONCE}
        found[sparsepo.TDPO1] = found[sparsepo.DPO_] = [{"seen": policy(0.6)}] * 2
        seen = {name: [each["seen"] for each in pieces] for name, pieces in found.items()}
        figures = sparsepo._figures(texts, found, seen, words)
        if expected == CONFIRMED:
            assert verdicts(figures) == {CONFIRMED}
        else:
            assert expected in verdicts(figures)
        about = sparsepo._about_masks(found[sparsepo.INDEPENDENT], words)
        assert about["zeros"] == f"{sum(number == 0 for number in mask) / 3:.1%}"
        assert set(sparsepo._about_masks(found[sparsepo.TDPO1], words)) == set(about)


def test_permuted_masks_have_the_same_numbers() -> None:
    """In another order within each response, without a gradient."""
    torch.manual_seed(0)
    pairs = random_pairs()
    learned = SparsePO("independent", LAYERS, WIDTH, init="ones").double()
    for mask in (learned.mask_u, learned.mask_d):
        torch.nn.init.normal_(mask.weight)  # type: ignore[union-attr, arg-type]
    permuted = sparsepo.Permuted(learned, 0)
    assert not [parameter for parameter in permuted.parameters() if parameter.requires_grad]
    for ours, theirs in zip(permuted.masks(pairs), learned.eval().masks(pairs), strict=True):
        assert not torch.equal(ours, theirs)
        for one, other, inside in zip(ours, theirs, pairs.mask, strict=True):
            torch.testing.assert_close(one[inside].sort().values, other[inside].sort().values)
            assert not one[~inside].any()


def test_rows_and_plots() -> None:
    texts = Made()
    assert row(texts, "DPO", [policy(0.6)])["effective texts"] == 115
    plot = frontier(texts, {"DPO": [[policy(0.6, 0.1)], [policy(0.55, 0.02)]]}, "title")
    assert plot["lines"][0]["x"] == pytest.approx([0, 0.02, 0.1])
    assert plot["lines"][0]["y"] == pytest.approx([0.5, 0.55, 0.6])
