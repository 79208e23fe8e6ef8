"""The goodness-of-fit test keeps both error rates: it passes right samplers and notices broken ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenworks.core.errors import InputError
from tokenworks.core.fit import goodness_of_fit

SKEWED = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


def test_a_right_sampler_fails_about_as_often_as_alpha() -> None:
    rng = np.random.default_rng(0)
    fits = [goodness_of_fit(rng.multinomial(1000, SKEWED), SKEWED, alpha=0.05) for _ in range(1000)]
    failures = sum(not fit.passed for fit in fits)
    assert 30 <= failures <= 70  # 50 expected, standard deviation 6.9
    assert np.mean([fit.p_value for fit in fits]) == pytest.approx(0.5, abs=0.05)


def test_a_broken_sampler_is_detected() -> None:
    # The classic mistake in speculative sampling: on rejection, draw from the target instead of the residual.
    target, draft = SKEWED, SKEWED[::-1]
    accepted = np.minimum(target, draft)
    broken = accepted + (1 - accepted.sum()) * target
    distance = np.abs(broken - target).sum() / 2
    fit = goodness_of_fit(np.random.default_rng(0).multinomial(20_000, broken), target, effect=distance)
    assert fit.power > 0.999
    assert not fit.passed


@pytest.mark.parametrize(("cells", "draws"), [(2, 2000), (6, 3000), (20, 6000)])
def test_stated_power_is_reached_at_the_hardest_alternative_and_passed_at_others(cells: int, draws: int) -> None:
    effect, rng = 0.03, np.random.default_rng(cells)
    target = np.full(cells, 1 / cells)
    # Half of the mass up, half down, all in proportion: Cauchy-Schwarz holds with equality.
    hardest = target * np.where(np.arange(cells) % 2, 1 + 2 * effect, 1 - 2 * effect)
    easier = target + np.eye(cells)[0] * effect - np.eye(cells)[1] * effect

    def detected(alternative: np.ndarray) -> float:
        fits = [
            goodness_of_fit(c, target, effect=effect, alpha=0.01) for c in rng.multinomial(draws, alternative, 800)
        ]
        return float(np.mean([not fit.passed for fit in fits]))

    stated = goodness_of_fit(draws * target // 1, target, effect=effect, alpha=0.01).power
    assert 0.1 < stated < 0.9
    assert detected(hardest) == pytest.approx(stated, abs=0.06)
    assert detected(easier) > stated - 0.06


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=40), st.integers(50, 5000), st.integers(0, 2**32 - 1))
def test_pooling_keeps_roomy_cells_apart_and_leaves_no_thin_one(weights: list[int], draws: int, seed: int) -> None:
    probabilities = np.array([50, 50, *weights]) / (100 + sum(weights))
    expected = probabilities * draws
    assume((np.abs(expected - 5) > 1e-6).all())
    fit = goodness_of_fit(np.random.default_rng(seed).multinomial(draws, probabilities), probabilities)
    roomy = expected[expected > 5]
    assert len(roomy) <= fit.degrees_of_freedom + 1 <= len(roomy) + (draws - roomy.sum()) / 5 + 1e-9
    assert fit.draws == draws
    assert 0 <= fit.p_value <= 1
    assert 0 < fit.power <= 1


def test_pooled_cells_are_judged_by_their_sum() -> None:
    fit = goodness_of_fit([500, 493, 7, 0], [0.5, 0.493, 0.004, 0.003])
    assert fit.degrees_of_freedom == 2
    assert fit.statistic == pytest.approx(0)
    assert fit.p_value == pytest.approx(1)


def test_a_last_pool_that_stays_thin_joins_the_one_before() -> None:
    # Five cells that expect 3 each become a pool of two and a pool of three.
    fit = goodness_of_fit([6, 0, 5, 4, 0], np.full(5, 0.2))
    assert fit.degrees_of_freedom == 1
    assert fit.statistic == pytest.approx(0)


def test_a_draw_of_probability_zero_fails_at_once_and_none_costs_nothing() -> None:
    fails = goodness_of_fit([50, 49, 1], [0.5, 0.5, 0.0])
    assert (fails.p_value, fails.statistic, fails.passed) == (0.0, math.inf, False)
    passes = goodness_of_fit([50, 50, 0], [0.5, 0.5, 0.0])
    assert (passes.p_value, passes.passed) == (1.0, True)
    assert passes.degrees_of_freedom == goodness_of_fit([50, 50], [0.5, 0.5]).degrees_of_freedom == 1


def test_a_certain_outcome_is_tested_too() -> None:
    fit = goodness_of_fit([0, 200], [0.0, 1.0], effect=0.02)
    assert fit.passed
    assert fit.power == pytest.approx(1 - 0.98**200)
    assert not goodness_of_fit([1, 199], [0.0, 1.0]).passed


def test_a_joint_distribution_may_keep_its_shape() -> None:
    probabilities = np.outer(SKEWED, SKEWED)
    counts = np.random.default_rng(0).multinomial(5000, probabilities.ravel()).reshape(6, 6)
    fit = goodness_of_fit(counts, probabilities)
    assert fit == goodness_of_fit(counts.ravel(), probabilities.ravel())
    assert fit.passed


def test_fit_states_p_and_power() -> None:
    fit = goodness_of_fit([5000, 5000], [0.5, 0.5])
    assert str(fit).startswith("fits: p = 1 over 10000 draws; power 0.7")
    assert str(goodness_of_fit([9000, 1000], [0.5, 0.5])).startswith("does not fit: p = 0 ")


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("counts", lambda: goodness_of_fit([1, 2], [0.2, 0.3, 0.5])),
        ("counts", lambda: goodness_of_fit([-1, 20], [0.5, 0.5])),
        ("counts", lambda: goodness_of_fit([1.5, 20], [0.5, 0.5])),
        ("counts", lambda: goodness_of_fit([math.nan, 20], [0.5, 0.5])),
        ("counts", lambda: goodness_of_fit([0, 0], [0.5, 0.5])),
        ("counts", lambda: goodness_of_fit([2, 3], [0.5, 0.5])),
        ("counts, probabilities", lambda: goodness_of_fit(["a", "b"], [0.5, 0.5])),
        ("probabilities", lambda: goodness_of_fit([10], [1.0])),
        ("probabilities", lambda: goodness_of_fit([10, 10], [0.5, 0.4])),
        ("probabilities", lambda: goodness_of_fit([10, 10], [1.5, -0.5])),
        ("probabilities", lambda: goodness_of_fit([10, 10], [math.nan, 0.5])),
        ("effect", lambda: goodness_of_fit([10, 10], [0.5, 0.5], effect=0)),
        ("alpha", lambda: goodness_of_fit([10, 10], [0.5, 0.5], alpha=1)),
    ],
)
def test_errors_name_the_argument(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=f"^{argument}: "):
        call()
