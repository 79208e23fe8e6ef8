"""How the methods are one family: every limiting case, on random pairs and on those of a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.align.made_up import LAYERS, WIDTH, loss_and_gradients, random_pairs
from tests.conftest import tiny_model
from tokenworks.align.cdpo import CDPO
from tokenworks.align.contract import Needs, Pairs, PreferenceMethod
from tokenworks.align.dpo import DPO
from tokenworks.align.reading import EncodedPair, collate, read_pairs
from tokenworks.align.scores import guide_rewards
from tokenworks.align.sparsepo import SparsePO
from tokenworks.align.tdpo import TDPO
from tokenworks.align.tgdpo import TGDPO

BETA = 0.3


class Masks(SparsePO):
    """SparsePO with two numbers for masks."""

    def __init__(self, m_u: float, m_d: float) -> None:
        super().__init__("scores", beta=BETA)
        self.numbers = m_u, m_d

    def masks(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        m_u, m_d = (number * pairs.mask.to(pairs.log_p.dtype) for number in self.numbers)
        return m_u, m_d


def of_ones() -> SparsePO:
    return SparsePO("independent", LAYERS, WIDTH, BETA, init="ones", dropout=0.0).double()


def scored(pairs: Pairs, number: float) -> Pairs:
    return replace(pairs, scores=number * pairs.mask.to(pairs.log_p.dtype))


def as_it_is(pairs: Pairs) -> Pairs:
    return pairs


Case = tuple[Callable[[], PreferenceMethod], Callable[[], PreferenceMethod], Callable[[Pairs], Pairs], str]

CASES: dict[str, Case] = {
    "TDPO2 without alpha is DPO": (lambda: TDPO(BETA, 0.0), lambda: DPO(BETA), as_it_is, "all"),
    "TDPO1 has the value of TDPO2 with alpha 1": (
        lambda: TDPO(BETA, variant="tdpo1"), lambda: TDPO(BETA, 1.0), as_it_is, "value",
    ),
    "SparsePO with masks of 1 is TDPO1": (
        lambda: Masks(1, 1), lambda: TDPO(BETA, variant="tdpo1"), as_it_is, "all",
    ),
    "SparsePO without divergence is DPO": (lambda: Masks(1, 0), lambda: DPO(BETA), as_it_is, "all"),
    "SparsePO with scores of 1 is TDPO1": (
        lambda: SparsePO("scores", beta=BETA), lambda: TDPO(BETA, variant="tdpo1"), lambda p: scored(p, 1.0),
        "all",
    ),
    "TGDPO without alpha is DPO": (lambda: TGDPO(BETA, 0.0), lambda: DPO(BETA), as_it_is, "all"),
    "TGDPO guided by the reference is DPO": (
        lambda: TGDPO(BETA, 0.9), lambda: DPO(BETA), lambda p: scored(p, 0.0), "all",
    ),
    "cDPO with scores of 0 is DPO": (lambda: CDPO(BETA), lambda: DPO(BETA), lambda p: scored(p, 0.0), "all"),
}  # fmt: skip


def check(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], what: str) -> None:
    torch.testing.assert_close(one[0], other[0])
    if what == "all":
        torch.testing.assert_close(one[1:], other[1:])
    else:
        assert not torch.allclose(one[2], other[2], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_limiting_cases_on_random_pairs(case: str, seed: int) -> None:
    ours, theirs, data, what = CASES[case]
    pairs = data(random_pairs(seed))
    check(loss_and_gradients(ours(), pairs), loss_and_gradients(theirs(), pairs), what)


@pytest.mark.parametrize("case", CASES)
def test_limiting_cases_on_a_model(case: str) -> None:
    """Loss, and gradients to the policy's weights."""
    ours, theirs, data, what = CASES[case]
    policy, reference = tiny_model("llama", 0), tiny_model("llama", 1)
    rewards = guide_rewards(reference, reference, BETA)
    rows = [([1, 2], [3, 4, 5], [6, 7]), ([8], [9, 10], [11, 12, 13])]
    batch = collate([EncodedPair(*row, rewards(row[0], row[1]), rewards(row[0], row[2])) for row in rows])
    found = []
    for make in (ours, theirs):
        policy.zero_grad()
        pairs = data(read_pairs(policy, reference, batch, Needs(divergence=True, scores="any")))
        loss = make()(pairs).loss
        loss.sum().backward()
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    if what == "all":
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-3)
    else:
        assert not torch.allclose(found[0][1], found[1][1], atol=1e-3)


METHODS: dict[str, tuple[Callable[[], PreferenceMethod], bool]] = {
    "DPO": (lambda: DPO(BETA), True),
    "TDPO1": (lambda: TDPO(BETA, variant="tdpo1"), True),
    "TDPO2": (lambda: TDPO(BETA, 0.7), True),
    "SparsePO from ones": (of_ones, True),
    "SparsePO": (lambda: SparsePO("common", LAYERS, WIDTH, BETA).double(), False),
    "TGDPO": (lambda: TGDPO(BETA, 0.5), False),
    "cDPO": (lambda: CDPO(BETA), False),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_is_log_2_at_the_reference(name: str) -> None:
    """And its gradient to log-probabilities is DPO's where no token counts more than another."""
    make, like_dpo = METHODS[name]
    pairs = scored(random_pairs(equal=True), 0.2)
    torch.manual_seed(1)
    loss, to_log_p, _ = loss_and_gradients(make(), pairs)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)
    _, plain, _ = loss_and_gradients(DPO(BETA), pairs)
    assert torch.allclose(to_log_p, plain) == like_dpo
