"""CostCurve: interpolation, honesty about noise, and errors."""

from __future__ import annotations

import pytest

from tests.conftest import tiny_model
from tokenworks.core.cost import CostCurve, measure_cost
from tokenworks.core.errors import InputError
from tokenworks.core.session import Session


def test_costs_between_and_beyond_the_measured_widths() -> None:
    cost = CostCurve((1, 3, 5), (1.0, 2.0, 4.0))
    assert [cost(width) for width in (1, 2, 3, 4, 5, 7)] == [1, 1.5, 2, 3, 4, 6]


def test_a_wider_pass_that_seems_cheaper_is_noise() -> None:
    assert CostCurve((1, 2, 3), (1.0, 0.5, 2.0)).seconds == (1.0, 1.0, 2.0)


def test_measuring_gives_a_time_for_each_width_and_leaves_an_empty_session() -> None:
    session = Session(tiny_model("llama", max_position_embeddings=256))
    cost = measure_cost(session, (1, 4, 300), context=2000, repeats=2)  # wider and longer than the context
    assert cost.widths == (1, 4, 300)
    assert min(cost.seconds) > 0
    assert (session.length, session.pending) == (0, 0)


@pytest.mark.parametrize(
    ("widths", "seconds"), [((1,), (1.0,)), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((1, 2), (0.0, 1.0))]
)
def test_bad_curves_are_named(widths: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="widths"):
        CostCurve(widths, seconds)
