"""RSD: recursive rejection by enumeration, draws without replacement, and what the drafters build."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.decode.test_spectr import pairs
from tokenworks.core.errors import InputError
from tokenworks.core.measure import goodness_of_fit
from tokenworks.core.sampling import Sampling
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.rsd import ConstantBranching, StochasticBeam, beam_step, gumbel_top_k, without
from tokenworks.decode.speculative_sampling import residual
from tokenworks.testing import ToyTarget


def output(p: Tensor, q: Tensor, k: int, replacement: bool = False, reverse: bool = False) -> tuple[Tensor, float]:
    """The exact output distribution of recursive rejection over all draws of k children, and its acceptance."""
    out, accepted = torch.zeros_like(q), 0.0
    draw = itertools.product(range(len(p)), repeat=k) if replacement else itertools.permutations(range(len(p)), k)
    for x in draw:
        left, rest = 1.0, p
        for token in x:
            left *= float(rest[token])
            rest = rest if replacement else without(rest, token)
        p_j, q_j = p, q
        for token in reversed(x) if reverse else x:
            chance = min(1.0, float(q_j[token] / p_j[token])) if p_j[token] > 0 else 0.0
            out[token] += left * chance
            accepted += left * chance
            left *= 1 - chance
            q_j = residual(q_j, p_j)
            p_j = p_j if replacement else without(p_j, token)
        out += left * q_j
    return out, accepted


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_the_output_is_the_target_exactly(k: int) -> None:
    for p, q in pairs(5):
        found, accepted = output(p, q, k)
        assert torch.allclose(found, q, atol=1e-12)
        if k == 1:
            assert accepted == pytest.approx(float(torch.minimum(p, q).sum()))
        if k == len(p):
            assert accepted == pytest.approx(1.0)


def test_multi_step_is_exact_for_independent_draws() -> None:
    for p, q in pairs(5):
        assert torch.allclose(output(p, q, 3, replacement=True)[0], q, atol=1e-12)


def test_the_order_of_the_draws_matters() -> None:
    assert any(not torch.allclose(output(p, q, 3, reverse=True)[0], q, atol=1e-3) for p, q in pairs(5))


def test_each_more_child_helps_and_none_is_wasted() -> None:
    for p, q in pairs(12):
        found = [output(p, q, k)[1] for k in range(1, 6)]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))
        assert all(found[k - 1] >= output(p, q, k, replacement=True)[1] - 1e-9 for k in (2, 3))


def test_two_tokens_are_enough_for_two_words() -> None:
    """The paper's Bernoulli toy: without replacement two children always hold the token, with it they may not."""
    p, q = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.2, 0.8]).double()
    assert output(p, q, 2)[1] == pytest.approx(1.0)
    assert output(p, q, 2, replacement=True)[1] < 0.99


def test_gumbel_top_k_draws_without_replacement() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    random = torch.Generator().manual_seed(0)
    tokens, values = gumbel_top_k(p.log().expand(20_000, 4), 2, random)
    counts = Counter(map(tuple, tokens.tolist()))
    exact = {(a, b): float(p[a] * p[b] / (1 - p[a])) for a, b in itertools.permutations(range(4), 2)}
    assert goodness_of_fit([counts[x] for x in exact], list(exact.values()), effect=0.05).passed
    assert bool((values[:, 0] > values[:, 1]).all())


def test_gumbel_top_k_says_where_nothing_was_left() -> None:
    tokens, values = gumbel_top_k(torch.tensor([0.0, -torch.inf, -torch.inf]), 5)
    assert tokens.shape == (3,)
    assert values.isinf().tolist() == [False, True, True]


def test_siblings_keep_the_value_of_their_parent() -> None:
    random = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(torch.randn(4, 50, generator=random, dtype=torch.float64), -1)
    log_p[0, 7:] = -torch.inf
    log_p[0, :7] = torch.log_softmax(log_p[0, :7], -1)
    g = torch.tensor([0.3, -0.5, -1.5, -6.0], dtype=torch.float64)
    phi_x, g_x = beam_step(torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64), g, log_p, random)
    assert torch.allclose(g_x.amax(-1), g)
    assert torch.equal(g_x.isneginf(), phi_x.isneginf())
    assert not g_x.isnan().any()


def test_stochastic_beams_are_paths_without_replacement() -> None:
    """Two paths of length two over three tokens: sets as often as sampling without replacement from the nine."""
    table = ToyTarget(3, 5)
    step = torch.softmax(table.table, -1).double()
    path_p = {(a, b): float(step[0, a] * step[a, b]) for a in range(3) for b in range(3)}
    exact: dict[frozenset[tuple[int, int]], float] = {}
    for one, other in itertools.permutations(path_p, 2):
        chosen = frozenset((one, other))
        exact[chosen] = exact.get(chosen, 0.0) + path_p[one] * path_p[other] / (1 - path_p[one])
    model = DraftModel(table, 3)
    drafter = StochasticBeam(model, width=2, depth=2)
    model.start([0], Sampling(1.0), torch.Generator().manual_seed(1))
    counts: Counter[frozenset[tuple[int, int]]] = Counter()
    for _ in range(4000):
        tree = drafter.propose([0], 2).tree
        leaves = [node for node, depth in enumerate(tree.shape.depths.tolist()) if depth == 2]
        paths = [tuple(tree.tokens[tree.shape.path_to(leaf)[1:]].tolist()) for leaf in leaves]
        counts[frozenset(paths)] += 1
        assert len(set(paths)) == 2
    assert goodness_of_fit([counts[x] for x in exact], list(exact.values()), effect=0.1).passed


def test_trees_have_the_sizes_they_promise() -> None:
    model = DraftModel(ToyTarget(5, 5), 5)
    for drafter, size in (
        (ConstantBranching(model, (3, 2, 1)), 1 + 3 + 6 + 6),
        (StochasticBeam(model, width=4, depth=3), 1 + 12),
    ):
        drafter.start([0], Sampling(1.0), None)
        draft = drafter.propose([0], 5)
        assert len(draft.tree) == size
        assert model.passes == 3, "one pass a level"
        assert all(
            len({int(draft.tree.tokens[c]) for c in below}) == len(below) for below in draft.tree.shape.children
        )


def test_top_p_leaves_fewer_children() -> None:
    model = DraftModel(ToyTarget(5, 5), 5)
    drafter = ConstantBranching(model, (5,))
    drafter.start([0], Sampling(1.0, top_p=0.3), None)
    draft = drafter.propose([0], 5)
    assert draft.probabilities is not None
    assert len(draft.tree) - 1 == int((draft.probabilities[0] > 0).sum()) < 5


def test_clear_errors() -> None:
    model = DraftModel(ToyTarget(3), 3)
    for branching in ((), (2, 0)):
        with pytest.raises(InputError, match="branching"):
            ConstantBranching(model, branching)
    with pytest.raises(InputError, match="width: 0"):
        StochasticBeam(model, width=0)
