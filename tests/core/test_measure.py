"""Measuring: order really alternates, ratios are those of a known clock, and intervals cover the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenworks.core import measure
from tokenworks.core.errors import InputError
from tokenworks.core.measure import (
    Indices,
    Interval,
    PairedRuns,
    auc,
    bootstrap,
    bootstrap_with_seeds,
    machine_facts,
    mean_interval,
    paired,
    ratio_of_sums,
)


class Clock:
    """Time that passes only when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, seconds: Callable[[int], float]) -> Callable[[int], int]:
        def candidate(item: int) -> int:
            self.now += seconds(item)
            return item * 10

        return candidate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: fake.now)
    return fake


def order_of_calls(n_names: int, n_items: int, repeats: int) -> list[str]:
    calls: list[str] = []
    names = "ABCDE"[:n_names]
    paired(
        {name: lambda _, name=name: calls.append(name) for name in names},
        range(n_items),
        repeats=repeats,
        warmup=0,
    )
    turns = [calls[i : i + n_names] for i in range(0, len(calls), n_names)]
    return ["".join(turn) for turn in turns]


def test_two_candidates_alternate_over_items_and_over_repeats() -> None:
    assert order_of_calls(2, n_items=4, repeats=2) == ["AB", "BA", "BA", "AB", "BA", "BA", "AB", "AB"]


@given(st.integers(2, 5), st.integers(0, 7))
def test_over_2n_turns_every_place_and_every_precedence_is_balanced(names: int, offset: int) -> None:
    turns = order_of_calls(names, n_items=offset + 2 * names, repeats=1)[offset:]
    letters = "ABCDE"[:names]
    assert all(sorted(turn) == list(letters) for turn in turns)
    for letter in letters:
        assert all(sum(turn[place] == letter for turn in turns) == 2 for place in range(names))
        for other in set(letters) - {letter}:
            assert sum(turn.index(letter) < turn.index(other) for turn in turns) == names


def test_paired_keeps_every_time_and_the_first_outputs(clock: Clock) -> None:
    passed = []
    done = paired(
        {"slow": clock.run(lambda item: 2.0 * item), "fast": clock.run(lambda item: 1.0 * item)},
        [1, 2, 3],
        repeats=2,
        progress=lambda count, total: passed.append((count, total)),
    )
    assert done.seconds == {"slow": [[2, 2], [4, 4], [6, 6]], "fast": [[1, 1], [2, 2], [3, 3]]}
    assert done.outputs == {"slow": [10, 20, 30], "fast": [10, 20, 30]}
    assert passed == [(count, 12) for count in range(1, 13)]


def test_outputs_are_those_of_the_first_timed_repeat_and_warmup_is_not_timed() -> None:
    calls: list[str] = []
    done = paired({"a": lambda item: calls.append(item) or len(calls)}, "xy", repeats=2, warmup=3)
    assert calls == ["x", "x", "x", "x", "y", "x", "y"]
    assert done.outputs == {"a": [4, 5]}


def test_ratio_of_a_known_speed_up_is_exact(clock: Clock) -> None:
    done = paired(
        {"plain": clock.run(lambda item: 3.0 * item), "tree": clock.run(lambda item: 2.0 * item)}, [1, 2, 5, 9]
    )
    same = done.ratio("tree", "plain")
    assert [same.value, same.low, same.high] == pytest.approx([1.5, 1.5, 1.5])
    # Twice the tokens in the same time is twice the speed.
    more = done.ratio("tree", "plain", work={"tree": [2, 4, 10, 18], "plain": [1, 2, 5, 9]})
    assert [more.value, more.low, more.high] == pytest.approx([3.0, 3.0, 3.0])
    assert done.ratio("plain", "tree").value == pytest.approx(1 / 1.5)


def test_ratio_is_of_totals_and_of_medians() -> None:
    done = PairedRuns({"a": [[1, 1, 90], [3, 3, 3]], "b": [[2, 2, 2], [10, 10, 0]]}, {"a": [0, 0], "b": [0, 0]})
    assert done.median_seconds("a") == [1, 3]
    interval = done.ratio("a", "b")
    assert interval.value == pytest.approx(12 / 4)
    assert (interval.low, interval.high) == pytest.approx((2, 10 / 3))


def test_pairing_cancels_what_makes_an_item_slow() -> None:
    item_cost = np.random.default_rng(0).lognormal(0, 1.5, size=30)
    done = PairedRuns({"a": [[s] for s in item_cost], "b": [[1.4 * s] for s in item_cost]}, {"a": [], "b": []})
    interval = done.ratio("a", "b")
    assert interval.high - interval.low < 1e-9


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(1.624, 1.548, 1.702, 0.95), "1.62 [1.55, 1.70]"),
        (Interval(123.4, 119.6, 131.2, 0.95), "123 [120, 131]"),
        (Interval(0.00123, 0.00101, 0.00150, 0.95), "0.00123 [0.00101, 0.00150]"),
        (Interval(0.0, -1.0, 1.0, 0.95), "0.00 [-1.00, 1.00]"),
        (Interval(0.0, 0.0, 0.0, 0.95), "0.00 [0.00, 0.00]"),
    ],
)
def test_interval_prints_three_figures(interval: Interval, text: str) -> None:
    assert str(interval) == text


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = {"mean": 0, "ratio": 0}
    for trial in range(300):
        passes = rng.integers(20, 60, size=40)
        tokens = passes * 2.5 + rng.normal(0, 10, size=40)
        mean, ratio = (
            mean_interval(tokens, draws=200, seed=trial),
            ratio_of_sums(tokens, passes, draws=200, seed=trial),
        )
        covered["mean"] += mean.low <= 2.5 * 39.5 <= mean.high
        covered["ratio"] += ratio.low <= 2.5 <= ratio.high
    assert all(0.90 <= count / 300 <= 0.98 for count in covered.values()), covered


def test_with_many_items_the_interval_is_the_normal_one() -> None:
    interval = mean_interval([1.0, -1.0] * 200)
    assert (interval.low, interval.high) == pytest.approx((-1.96 / 20, 1.96 / 20), abs=0.008)


def test_seeds_are_resampled_with_the_items() -> None:
    """The estimate takes each once; seeds that differ widen what items alone leave narrow."""
    values = np.array([[0.0] * 20, [1.0] * 20, [2.0] * 20])
    calls: list[tuple[int, int]] = []

    def mean(items: Indices, seeds: Indices) -> float:
        calls.append((len(items), len(seeds)))
        return float(values[seeds][:, items].mean())

    found = bootstrap_with_seeds(mean, 20, 3, draws=200)
    assert found.value == 1
    assert found.low < 0.5 < 1.5 < found.high
    assert set(calls) == {(20, 3)}
    alike = bootstrap_with_seeds(lambda items, _: float(items.mean()), 20, 3, draws=200)
    assert alike == bootstrap(lambda items: float(items.mean()), 20, draws=200)


def test_a_lower_level_gives_a_narrower_interval_and_a_seed_repeats_it() -> None:
    values = np.random.default_rng(0).exponential(size=25)
    wide, narrow = mean_interval(values), mean_interval(values, level=0.5)
    assert wide == mean_interval(values) != mean_interval(values, seed=1)
    assert wide.low < narrow.low < narrow.value == values.mean() < narrow.high < wide.high


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=2, max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_a_ratio_and_its_interval_lie_between_the_items_extremes(pairs: list[tuple[int, int]], seed: int) -> None:
    above, below = zip(*pairs, strict=True)
    interval = ratio_of_sums(above, below, draws=50, seed=seed)
    ratios = np.array(above) / np.array(below)
    assert interval.value == pytest.approx(sum(above) / sum(below))
    slack = 1e-9 * ratios.max()
    assert ratios.min() - slack <= interval.low <= interval.high <= ratios.max() + slack


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("runs", lambda: paired({}, [1])),
        ("items", lambda: paired({"a": str}, [])),
        ("repeats", lambda: paired({"a": str}, [1], repeats=0)),
        ("warmup", lambda: paired({"a": str}, [1], warmup=-1)),
        ("name", lambda: paired({"a": str}, [1]).median_seconds("b")),
        ("name", lambda: paired({"a": str}, [1, 2]).ratio("a", "b")),
        ("n_items", lambda: paired({"a": str}, [1]).ratio("a", "a")),
        ("work", lambda: paired({"a": str}, [1, 2]).ratio("a", "a", work={})),
        (r"work\['a'\]", lambda: paired({"a": str}, [1, 2]).ratio("a", "a", work={"a": [1]})),
        (r"work\['a'\]", lambda: paired({"a": str}, [1, 2]).ratio("a", "a", work={"a": [0, 0]})),
        ("n_items", lambda: bootstrap(lambda items: 1.0, 1)),
        ("draws", lambda: bootstrap(lambda items: 1.0, 2, draws=0)),
        ("level", lambda: bootstrap(lambda items: 1.0, 2, level=95)),
        ("statistic", lambda: bootstrap(lambda items: math.nan, 2)),
        ("statistic", lambda: ratio_of_sums([1, 2, 3], [0, 0, 1])),
        ("values", lambda: mean_interval([])),
        ("values", lambda: mean_interval([1.0])),
        ("values", lambda: mean_interval([1.0, math.nan])),
        ("values", lambda: mean_interval([[1.0], [2.0]])),
        ("values", lambda: mean_interval(["one", "two"])),
        ("denominators", lambda: ratio_of_sums([1, 2], [1, 2, 3])),
        ("denominators", lambda: ratio_of_sums([1, 2], [1, -2])),
    ],
)
def test_errors_name_the_argument(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=f"^{argument}: "):
        call()


def test_machine_facts_are_what_a_timing_depends_on_and_name_no_path() -> None:
    facts = machine_facts()
    assert set(facts) == {"cpu", "cores", "torch", "transformers", "python", "platform", "linear layers"}
    assert all(facts.values())
    # A processor's name may hold a slash ("w/ Radeon Graphics").
    assert not any("/" in str(value) for name, value in facts.items() if name != "cpu")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.9, 0.8, 0.2, 0.1], 1.0), ([0.1, 0.2, 0.8, 0.9], 0.0), ([0.5] * 4, 0.5), ([0.9, 0.3, 0.5, 0.1], 0.75)],
)
def test_auc_counts_pairs(scores: list[float], expected: float) -> None:
    assert auc(scores, [True, True, False, False]) == expected


def test_auc_of_one_kind_is_refused() -> None:
    with pytest.raises(InputError, match="positive: 2 of 2 for 2 scores"):
        auc([1.0, 2.0], [True, True])
