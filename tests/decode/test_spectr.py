"""SpecTr: K-SEQ against the exact transport plan, its residual, and the drafts it is given."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.tree import TokenTree
from tokenworks.decode.contract import Draft
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.rsd import RecursiveRejection
from tokenworks.decode.spectr import (
    IndependentDrafts,
    KSequential,
    acceptance,
    division_parameter,
    leftover,
    optimal_acceptance,
    optimal_plan,
)
from tokenworks.testing import ToyTarget


def pairs(count: int, vocabulary: int = 5, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random draft and target distributions, spiky enough to differ."""
    torch.manual_seed(seed)
    draw = torch.distributions.Dirichlet(torch.full((vocabulary,), 0.5, dtype=torch.float64))
    return [(draw.sample(), draw.sample()) for _ in range(count)]


def output_of_k_seq(p: Tensor, q: Tensor, k: int, rho: float) -> Tensor:
    """The exact distribution of K-SEQ's output, by going through all tuples of candidates."""
    out = torch.zeros_like(q)
    for x in itertools.product(range(len(p)), repeat=k):
        left = float(torch.prod(p[list(x)]))
        for candidate in x:
            chance = min(1.0, float(q[candidate] / (rho * p[candidate]))) if p[candidate] > 0 else 0.0
            out[candidate] += left * chance
            left *= 1 - chance
        out += left * leftover(p, q, k, rho)
    return out


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_output_is_the_target_exactly(k: int) -> None:
    for p, q in pairs(6):
        best = division_parameter(p, q, k)
        for rho in (best, (best + k) / 2, float(k)):
            assert torch.allclose(output_of_k_seq(p, q, k, rho), q, atol=1e-12)


def test_below_rho_the_residual_would_be_negative() -> None:
    negative = 0
    for p, q in pairs(12):
        for k in (2, 4):
            for factor, sign in ((1.0, 1), (0.9, -1)):
                rho = max(1.0, factor * division_parameter(p, q, k))
                taken = torch.minimum(p, q / rho)
                beta = float(taken.sum())
                rest = q - taken * (1 - (1 - beta) ** k) / beta
                if sign > 0:
                    assert float(rest.min()) >= -1e-12
                else:
                    negative += float(rest.min()) < -1e-6
    assert negative > 0


def test_one_candidate_is_ordinary_speculative_sampling() -> None:
    for p, q in pairs(12):
        assert division_parameter(p, q, 1) == 1.0
        assert acceptance(p, q, 1) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()))
        assert torch.allclose(leftover(p, q, 1, 1.0), (q - p).clamp(min=0) / (q - p).clamp(min=0).sum())


@pytest.mark.parametrize(("k", "vocabulary"), [(1, 5), (2, 5), (3, 4)])
def test_acceptance_against_the_optimal_plan(k: int, vocabulary: int) -> None:
    for p, q in pairs(8, vocabulary):
        best, plan = optimal_plan(p, q, k)
        assert best == pytest.approx(optimal_acceptance(p, q, k), abs=1e-8)
        assert best == pytest.approx(by_all_subsets(p, q, k), abs=1e-8)
        assert plan.sum(0) == pytest.approx(q.numpy(), abs=1e-8)
        ours = acceptance(p, q, k)
        assert (1 - (1 - 1 / k) ** k) * best - 1e-9 <= ours <= best + 1e-9
        assert best <= float(torch.minimum(q, 1 - (1 - p) ** k).sum()) + 1e-9
        if k == 1:
            assert ours == pytest.approx(best, abs=1e-8)


def by_all_subsets(p: Tensor, q: Tensor, k: int) -> float:
    """The dual of the transport problem, without the claim that prefixes are enough."""
    return min(
        float(q[list(s)].sum() + 1 - p[list(s)].sum() ** k)
        for size in range(len(p) + 1)
        for s in itertools.combinations(range(len(p)), size)
    )


def test_more_candidates_are_accepted_more_often() -> None:
    for p, q in pairs(12):
        p = 0.98 * p + 0.02 / len(p)  # every token of the target can be drafted
        found = [acceptance(p, q, k) for k in (1, 2, 4, 8, 16, 32, 64)]
        best = [optimal_acceptance(p, q, k) for k in (1, 2, 4, 8, 16, 32, 64)]
        rho = [division_parameter(p, q, k) for k in (1, 2, 4, 8)]
        assert all(a <= b + 1e-9 for series in (found, best, rho) for a, b in itertools.pairwise(series))
        assert all(1 <= r <= k for r, k in zip(rho, (1, 2, 4, 8), strict=True))
        assert found[-1] >= 1 - 1 / math.e
        assert best[-1] > 0.7


def test_the_ends_of_the_scale() -> None:
    p = pairs(1)[0][0]
    assert acceptance(p, p, 4) == pytest.approx(1.0)
    left, right = torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0, 0, 0.3, 0.7]).double()
    assert acceptance(left, right, 3) == 0
    assert optimal_acceptance(left, right, 3) == 0
    assert torch.equal(leftover(left, right, 3, division_parameter(left, right, 3)), right)


def test_k_seq_beats_multi_step_on_a_fixed_set() -> None:
    for p, q in pairs(12):
        for k in (2, 3):
            assert acceptance(p, q, k) >= multi_step_acceptance(p, q, k) - 1e-9


def multi_step_acceptance(p: Tensor, q: Tensor, k: int) -> float:
    left = 1.0
    for _ in range(k):
        overlap = float(torch.minimum(p, q).sum())
        left *= 1 - overlap
        q = (q - p).clamp(min=0)
        if float(q.sum()) < 1e-15:
            break
        q = q / q.sum()
    return 1 - left


def test_drafts_that_agree_share_their_nodes() -> None:
    model = DraftModel(ToyTarget(3, 5), 3)
    drafter = IndependentDrafts(model, drafts=6, length=3)
    model.start([0], Sampling(1.0), torch.Generator().manual_seed(0))
    draft = drafter.propose([0], 3)
    children = draft.tree.shape.children
    assert len(draft.drawn(0)) == 6
    for node, below in enumerate(children):
        assert set(draft.drawn(node)) == set(below)
        assert len({int(draft.tree.tokens[child]) for child in below}) == len(below)
        if node and below:
            above = draft.tree.shape.parents[node]
            assert len(draft.drawn(node)) == list(draft.drawn(above)).count(node), "k is what has survived"
    assert len(draft.tree) < 1 + 6 * 3
    assert model.passes == 3, "one pass a level"


def test_unequal_counts_matter() -> None:
    """With k fixed at K instead of the drafts that survived, the walk would not follow the target."""
    p, q = pairs(1, 3)[0]
    out = output_of_k_seq(p, q, 2, division_parameter(p, q, 2))
    assert torch.allclose(out, q)
    chance = torch.minimum(p, q / division_parameter(p, q, 2))
    wrong = chance + (1 - chance.sum()) * leftover(p, q, 2, division_parameter(p, q, 2))
    assert not torch.allclose(wrong, q, atol=1e-3)


def test_clear_errors() -> None:
    model = DraftModel(ToyTarget(3), 3)
    with pytest.raises(InputError, match="drafts: 0"):
        IndependentDrafts(model, drafts=0)
    with pytest.raises(InputError, match="length: 0"):
        IndependentDrafts(model, length=0)
    with pytest.raises(InputError, match="optimal_acceptance"):
        optimal_plan(torch.full((50,), 0.02).double(), torch.full((50,), 0.02).double(), 4)


def test_a_greedy_target_is_followed() -> None:
    """One-hot q: the argmax is taken if any candidate is it."""
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 1.0], [3.0, 0.0, 0.0]])
    draft = Draft(TokenTree.of([0, 2, 1], [-1, 0, 0]), torch.tensor([[0.2, 0.3, 0.5]] * 3), [[1, 2], [], []])
    for verifier in (KSequential(), RecursiveRejection(replacement=True)):
        verdict = verifier.verify(draft, logits, Sampling(), None)
        assert (verdict.path, verdict.bonus) == ([0, 2], 0)
