"""Sampling agrees with Hugging Face's own warpers, and its distributions are distributions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling, top_ids


def rows(seed: int, vocabulary: int = 200) -> torch.Tensor:
    return 3 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10**6), st.floats(0.1, 3), st.none() | st.integers(1, 300), st.none() | st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_matches_the_warpers_of_transformers(seed: int, heat: float, k: int | None, p: float | None) -> None:
    logits = rows(seed)
    warped = TemperatureLogitsWarper(heat)(None, logits)
    if k is not None:
        warped = TopKLogitsWarper(k)(None, warped)
    if p is not None and p < 1:
        warped = TopPLogitsWarper(p)(None, warped)
    expected = torch.softmax(warped, -1)
    found = Sampling(heat, k, p).distribution(logits)
    torch.testing.assert_close(found.sum(-1), torch.ones(5))
    # A token exactly at the edge of top-p may fall on either side by rounding, in one row of five at most.
    same = torch.isclose(found, expected, atol=1e-5).all(-1)
    assert int(same.sum()) >= 4


def test_greedy_is_one_hot_at_the_first_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
    assert Sampling().distribution(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert Sampling().draw(logits[0]) == 1


def test_draws_are_seeded() -> None:
    draw = [Sampling(1.0).draw(rows(0)[0], torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draw[0] == draw[1]


@pytest.mark.parametrize("vocabulary", [97, 1024, 6400, 49152])
@pytest.mark.parametrize("k", [1, 8])
def test_top_ids_are_those_of_topk(vocabulary: int, k: int) -> None:
    logits = rows(1, vocabulary)
    assert torch.equal(top_ids(logits, k), logits.topk(k, -1).indices)


def test_values_out_of_range_are_named() -> None:
    for kwargs in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ):
        with pytest.raises(InputError, match=next(iter(kwargs))):
            Sampling(**kwargs)
