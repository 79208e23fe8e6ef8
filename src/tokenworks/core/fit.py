"""Goodness of fit: do these draws come from that distribution, and would we have noticed if they did not?

A test that passes says little until one knows how likely it was to fail a broken sampler, so every test here
states its power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from tokenworks.core.errors import InputError

Floats = NDArray[np.float64]

MIN_EXPECTED = 5.0
"""The least expected count of a chi-square cell (Cochran 1954); thinner cells are pooled."""


@dataclass(frozen=True)
class FitTest:
    """Outcome of a chi-square test of goodness of fit.

    Args:
        statistic: Pearson's chi-square; infinite if something was drawn that has probability 0.
        degrees_of_freedom: cells after pooling, less one.
        p_value: probability of such a statistic or a larger one if the sampler is right.
        power: lower bound on the probability that the test fails a sampler at distance `effect`.
        effect: total-variation distance, in (0, 1), that `power` is about.
        alpha: significance level: how often a right sampler fails.
        draws: observations counted.
    """

    statistic: float
    degrees_of_freedom: int
    p_value: float
    power: float
    effect: float
    alpha: float
    draws: int

    @property
    def passed(self) -> bool:
        """Whether the counts are compatible with the probabilities: p_value >= alpha."""
        return self.p_value >= self.alpha

    def __str__(self) -> str:
        return (
            f"{'fits' if self.passed else 'does not fit'}: p = {self.p_value:.3g} over {self.draws} draws; "
            f"power {self.power:.3f} to notice total-variation distance {self.effect:g} at alpha {self.alpha:g}"
        )


def goodness_of_fit(
    counts: ArrayLike, probabilities: ArrayLike, *, effect: float = 0.02, alpha: float = 0.001
) -> FitTest:
    """Pearson's chi-square test of observed counts against exact probabilities (Pearson 1900).

    Cells with an expected count below 5 are pooled with one another. The power is that of the noncentral
    chi-square with noncentrality 4 n effect^2 (Cohen 1988): by Cauchy-Schwarz, sum (q - p)^2 / p >=
    (sum |q - p|)^2 = 4 TV^2 for every alternative q. So, in the large-sample approximation, no alternative at that
    total-variation distance (measured after pooling) is noticed less often.

    Args:
        counts: how often each outcome was drawn: whole numbers, any shape.
        probabilities: of each outcome, in the same shape, summing to 1 within 1e-6.
        effect: total-variation distance, in (0, 1), to state the power for.
        alpha: significance level, in (0, 1).

    Returns:
        The test. A draw of an outcome with probability 0 gives p_value 0.0.

    Raises:
        InputError: unequal shapes, counts or probabilities out of range, or too few draws to fill two cells.
    """
    observed, expected = _checked_cells(counts, probabilities)
    for name, number in (("effect", effect), ("alpha", alpha)):
        if not 0 < number < 1:
            raise InputError(f"{name}: {number} is not between 0 and 1")
    draws = int(observed.sum())
    impossible = bool(observed[expected == 0].any())
    if np.count_nonzero(expected) == 1:
        # Only one outcome is possible, so a wrong sampler is noticed when it first draws another.
        degrees, statistic, power = 0, 0.0, 1 - (1 - effect) ** draws
    else:
        observed, expected = _pool(observed, expected)
        degrees = len(expected) - 1
        statistic = float(((observed - expected) ** 2 / expected).sum())
        power = float(stats.ncx2.sf(stats.chi2.isf(alpha, degrees), degrees, draws * 4 * effect**2))
    p_value = float(stats.chi2.sf(statistic, degrees)) if degrees else 1.0
    if impossible:
        statistic, p_value = math.inf, 0.0
    return FitTest(statistic, degrees, p_value, power, effect, alpha, draws)


def _checked_cells(counts: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats]:
    """Observed and expected counts, float64 [cells] each, the latter summing to the former's sum."""
    try:
        observed = np.asarray(counts, dtype=np.float64)
        chances = np.asarray(probabilities, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"counts, probabilities: expected arrays of numbers ({error})") from error
    if observed.shape != chances.shape:
        raise InputError(f"counts: shape {list(observed.shape)}, but probabilities have {list(chances.shape)}")
    if observed.size < 2:
        raise InputError("probabilities: a single outcome leaves nothing to test; give every possible outcome")
    if not (observed >= 0).all() or not np.isfinite(observed).all() or (observed % 1).any():
        raise InputError("counts: they must be whole numbers from 0 upwards")
    if not observed.any():
        raise InputError("counts: all are 0; draw something first")
    if not (chances >= 0).all():
        raise InputError("probabilities: they must be numbers from 0 upwards")
    if not abs(chances.sum() - 1) <= 1e-6:
        raise InputError(f"probabilities: they sum to {chances.sum():.7g}, not to 1; give every possible outcome")
    return observed.ravel(), chances.ravel() / chances.sum() * observed.sum()


def _pool(observed: Floats, expected: Floats) -> tuple[Floats, Floats]:
    """Merge cells, thinnest first, into pools that each reach `MIN_EXPECTED`; a roomy cell stays by itself.

    What is merged depends on the expected counts only: looking at the observed ones would bias the test.
    """
    order = np.argsort(expected, kind="stable")
    observed, expected = observed[order], expected[order]
    starts, filled = [0], 0.0
    for cell, count in enumerate(expected.tolist()):
        filled += count
        if filled >= MIN_EXPECTED:
            starts.append(cell + 1)
            filled = 0.0
    # The last start is the end itself, or opens a pool that stayed thin, which so joins the one before it.
    starts.pop()
    if len(starts) < 2:
        draws = int(observed.sum())
        raise InputError(
            f"counts: {draws} draws do not fill two cells with {MIN_EXPECTED:g} expected each; draw more"
        )
    return np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)
