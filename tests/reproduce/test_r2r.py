"""R2R's reproduction: equal shares along curves, gaps and subsequences, on made-up pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokenworks.reproduce.routing import Found, common

EVERY = np.arange(2)


def piece(ids: list[int], nats: float, routed: int, seconds: float = 1.0) -> dict[str, Any]:
    counts = {"nats": nats, "words": len(ids), "routed": routed, "read": routed, "seconds": seconds}
    return {"token_ids": ids, "counts": counts}


@pytest.fixture
def found() -> Found:
    """Two prompts of ten tokens; the small model needs 4 nats a token, the large 1, R2R 2 at a share of 0.5."""
    made = Found(["a", "b"])
    target = list(range(10))
    for _ in range(2):
        made.add("small", piece([9] * 10, 40, 0, 0.5))
        made.add("large", piece(target, 10, 10, 1.0))
        made.add("R2R a", piece([0, 1, 2, 3, 4, 90, 90, 90, 90, 90], 20, 5, 0.8))
        made.add("R2R b", piece(target, 10, 10, 1.0))
        made.add("entropy a", piece([*target[:8], 90, 90], 34, 2))
        made.add("entropy b", piece(target, 16, 8))
        for seed in (0, 1):
            made.add(f"random a #{seed}", piece([9] * 10, 30 + 2 * seed, 4 + 2 * seed))
            made.add(f"random b #{seed}", piece(target, 10, 10))
    return made


def test_quality_is_compared_at_equal_shares(found: Found) -> None:
    assert found.share("R2R a")(EVERY) == 0.5
    # Half-way between the entropy router's 3.4 nats at 0.2 and 1.6 at 0.8.
    assert found.rival("entropy", "a", found.nats)(EVERY) == pytest.approx(2.5)
    assert found.rival("entropy", "b", found.nats)(EVERY) == pytest.approx(1.0), "both end at the large model"
    ahead = found.ahead("entropy", lambda name: lambda items: -found.nats(name)(items))
    assert ahead.value == pytest.approx((0.5 + 0.0) / 2)
    assert (ahead.low, ahead.high) == pytest.approx((ahead.value, ahead.value)), "both prompts are alike"


def test_seeds_are_summed(found: Found) -> None:
    assert found.nats("random a")(EVERY) == pytest.approx(3.1)
    assert found.share("random a")(EVERY) == pytest.approx(0.5)


def test_the_gap_recovered(found: Found) -> None:
    assert found.recovered("R2R a")(EVERY) == pytest.approx(2 / 3)
    assert found.recovered("small")(EVERY) == 0
    assert found.recovered("large")(EVERY) == 1


def test_overlap_and_repetition(found: Found) -> None:
    assert found.overlap("large")(EVERY) == 1
    assert found.overlap("R2R a")(EVERY) == 0.5
    assert found.ratio("small", "distinct", "pairs")(EVERY) == pytest.approx(1 / 9)
    assert found.ratio("large", "distinct", "pairs")(EVERY) == 1
    assert found.speed("small").value == pytest.approx(2)


def test_common_subsequences() -> None:
    assert common([1, 2, 3, 4], [2, 4, 9]) == 2
    assert common([1, 2, 3], [3, 2, 1]) == 1
    assert common([], [1]) == 0
    assert common([5, 1, 5, 2, 5, 3], [1, 2, 3]) == 3
