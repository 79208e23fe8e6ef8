"""DySpec: values, the best tree of a size, and the order that keeps it exact."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Literal

import pytest
import torch

from tests.conftest import tiny_model
from tokenworks.core.errors import InputError
from tokenworks.core.measure import goodness_of_fit
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.tree import ROOT, TokenTree, TreeShape
from tokenworks.decode.contract import Draft, Law, Verdict
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.dyspec import DynamicTree, nonzero_blocks, reorder
from tokenworks.decode.rsd import RecursiveRejection
from tokenworks.testing import ToyTarget


def planted(drafter: DynamicTree, room: int = 8, seed: int = 0, sampling: Sampling | None = None) -> Draft:
    drafter.start([0], sampling or Sampling(1.0), torch.Generator().manual_seed(seed))
    return drafter.propose([0], room)


def slot_values(drafter: DynamicTree, draft: Draft) -> list[float]:
    """The value of the slot each node was drawn from, worked out anew from the draft's distributions."""
    assert draft.probabilities is not None
    shape, values = draft.tree.shape, [1.0] * len(draft.tree)
    for node, children in enumerate(shape.children):
        value, left = drafter.estimates[node], 1.0
        for child in children:
            values[child] = value
            share = float(draft.probabilities[node, draft.tree.tokens[child]]) / left
            assert drafter.estimates[child] == pytest.approx(value * share, abs=1e-6)
            value, left = value * (1 - share), left * (1 - share)
    return values


def test_values_fall_and_are_drawn_from_the_largest_down() -> None:
    for seed in range(20):
        drafter = DynamicTree(DraftModel(ToyTarget(4, 5), 4), budget=10)
        draft = planted(drafter, seed=seed)
        values = slot_values(drafter, draft)
        assert len(draft.tree) == 11
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(values[1:])), (
            "nodes stand in the order of the draws"
        )


def test_no_tree_of_the_size_has_more_value() -> None:
    """Against all trees, with the draws of every slot fixed beforehand: children come in one order per node."""
    table = torch.softmax(ToyTarget(3, 5).table.double(), -1)
    for budget in (3, 5):
        drafter = DynamicTree(DraftModel(ToyTarget(3, 5), 3), budget=budget, children="best")
        planted(drafter)
        order = table.argsort(dim=-1, descending=True)

        def best(slots: tuple[tuple[float, int, int], ...], n: int, order: torch.Tensor = order) -> float:
            if n == 0 or not slots:
                return 0.0
            found = 0.0
            for place, (value, token, rank) in enumerate(slots):
                rest = slots[:place] + slots[place + 1 :]
                taken = table[token, order[token, :rank]].sum()
                child = int(order[token, rank])
                share = float(table[token, child] / (1 - taken))
                below = ((value * share, child, 0),)
                beside = ((value * (1 - share), token, rank + 1),) if rank < 2 else ()
                found = max(found, value + best(rest + below + beside, n - 1))
            return found

        draft = Draft(drafter._tree.finish().tree, drafter._tree.finish().probabilities)  # type: ignore[union-attr]
        assert sum(slot_values(drafter, draft)[1:]) == pytest.approx(best(((1.0, 0, 0),), budget), abs=1e-5)


def test_estimates_add_up_to_the_accepted_tokens() -> None:
    """If each child were accepted with its share, as the paper assumes, the sum of estimates would be the mean."""
    drafter = DynamicTree(DraftModel(ToyTarget(4, 5), 4), budget=8)
    draft = planted(drafter)
    values = slot_values(drafter, draft)
    random, total, runs = torch.Generator().manual_seed(0), 0, 20_000
    coins = torch.rand(runs, len(values), generator=random).tolist()
    for coin in coins:
        node = 0
        while True:
            taken = next(
                (c for c in draft.tree.shape.children[node] if coin[c] < drafter.estimates[c] / values[c]), None
            )
            if taken is None:
                break
            total, node = total + 1, taken
    assert total / runs == pytest.approx(sum(drafter.estimates[1:]), rel=0.02)


def test_a_sure_draft_is_a_chain_and_an_even_one_a_star() -> None:
    sure, even = ToyTarget(4), ToyTarget(4)
    sure.table = 50 * torch.eye(4).roll(1, 1)
    even.table = torch.zeros(4, 4)
    chain = planted(DynamicTree(DraftModel(sure, 4), budget=4))
    assert chain.tree.shape.is_chain
    star = planted(DynamicTree(DraftModel(even, 4), budget=3))
    assert star.tree.shape.parents == (ROOT, 0, 0, 0)


def test_the_threshold_decides_the_size_and_levels_the_passes() -> None:
    sizes = []
    for threshold in (0.4, 0.2, 0.05):
        made = []
        for seed in range(20):
            model = DraftModel(ToyTarget(4, 5), 4)
            drafter = DynamicTree(model, budget=30, depth=3, threshold=threshold)
            draft = planted(drafter, seed=seed)
            made.append(len(draft.tree) - 1)
            assert all(value > threshold for value in slot_values(drafter, draft)[1:])
            assert made[-1] <= 30
            assert int(draft.tree.shape.depths.max()) <= 3
            assert model.passes <= 3
        sizes.append(sum(made))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_all_tokens_drawn_means_nothing_left_to_draw() -> None:
    draft = planted(DynamicTree(DraftModel(ToyTarget(3, 5), 3), budget=30, depth=2))
    assert len(draft.tree) == 1 + 3 + 9
    verdict = RecursiveRejection().verify(draft, ToyTarget(3).table[draft.tree.tokens], Sampling(1.0), None)
    assert len(verdict.path) == 3, "with every token drawn, one is accepted at each level"


def test_no_more_levels_than_there_is_room() -> None:
    assert int(planted(DynamicTree(DraftModel(ToyTarget(3, 5), 3)), room=2).tree.shape.depths.max()) == 2


def test_fewer_passes_of_the_draft_than_nodes() -> None:
    model = DraftModel(ToyTarget(6, 5), 6)
    planted(DynamicTree(model, budget=12, depth=6))
    assert model.passes < 12


class _DropsAfterDraw(DynamicTree):
    """Broken: a child that turns out to be unlikely is taken back."""

    def grow(self, tree: object, room: int) -> Draft:
        draft = super().grow(tree, room)  # type: ignore[arg-type]
        parents = draft.tree.shape.parents
        kept = [0]
        for node in range(1, len(draft.tree)):
            if parents[node] in kept and self.estimates[node] > 0.45:
                kept.append(node)
        assert draft.probabilities is not None
        shape = [ROOT, *(kept.index(parents[node]) for node in kept[1:])]
        return Draft(TokenTree.of(draft.tree.tokens[kept], shape), draft.probabilities[kept])

    def observe(self, draft: Draft, logits: torch.Tensor, verdict: Verdict) -> None:
        pass


@pytest.mark.parametrize(("kind", "right"), [(DynamicTree, True), (_DropsAfterDraw, False)])
def test_a_child_once_drawn_stays(kind: type[DynamicTree], right: bool) -> None:
    target, sampling = ToyTarget(3), Sampling(1.0)
    exact = target.string_probabilities(0, 2, sampling)
    drafter = kind(DraftModel(ToyTarget(3, 5), 3), budget=4, depth=2)
    drafter.start([0], sampling, torch.Generator().manual_seed(3))
    verifier, random = RecursiveRejection(), torch.Generator().manual_seed(4)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(2500):
        string = [0]
        while len(string) < 3:
            draft = drafter.propose(string, 2)
            verdict = verifier.verify(draft, target.table[draft.tree.tokens], sampling, random)
            string += [*draft.tree.tokens[verdict.path[1:]].tolist(), verdict.bonus]
        counts[tuple(string[1:3])] += 1
    assert goodness_of_fit([counts[s] for s in exact], list(exact.values()), effect=0.1).passed is right


def test_laws_and_clear_errors() -> None:
    model = DraftModel(ToyTarget(3), 3)
    assert DynamicTree(model).law is Law.WITHOUT_REPLACEMENT
    assert DynamicTree(model, children="best").law is Law.FIXED
    with pytest.raises(InputError, match="budget: 0"):
        DynamicTree(model, budget=0)
    with pytest.raises(InputError, match=r"threshold: 1\.5"):
        DynamicTree(model, threshold=1.5)


def random_shape(size: int, seed: int) -> TreeShape:
    random = torch.Generator().manual_seed(seed)
    return TreeShape((ROOT, *(int(torch.randint(node, (1,), generator=random)) for node in range(1, size))))


def moved(tree: TokenTree, order: list[int]) -> TokenTree:
    place = {node: number for number, node in enumerate(order)} | {ROOT: ROOT}
    return TokenTree.of(tree.tokens[order], [place[tree.shape.parents[node]] for node in order])


@pytest.mark.parametrize("by", ["depth", "heavy path"])
def test_the_order_of_nodes_changes_no_logits(by: Literal["depth", "heavy path"]) -> None:
    session = Session(tiny_model("llama", dtype=torch.float64))
    for seed in range(3):
        tree = TokenTree(torch.arange(20) % 97, random_shape(20, seed))
        session.prefill([1, 2, 3])
        before = session.extend(tree)
        session.rollback()
        order = reorder(tree.shape, by)
        assert sorted(order) == list(range(20))
        after = session.extend(moved(tree, order))  # a tree whose parents do not come first is refused
        session.rollback(0)
        assert torch.allclose(after, before[order], atol=1e-5)


def test_branches_that_lie_together_touch_fewer_blocks() -> None:
    # Two chains of 40 nodes, grown in turns: every block is touched until the chains are laid end to end.
    shape = TreeShape((ROOT, 0, *range(79)))
    assert nonzero_blocks(shape.ancestors, 8) == 66
    apart = reorder(shape, "depth")
    assert nonzero_blocks(shape.ancestors[apart][:, apart], 8) == 46
    assert nonzero_blocks(torch.eye(9, 12, dtype=torch.bool), 4) == 3
    # A side branch of one node is left for later, so that the long one starts right under the root.
    assert reorder(TreeShape((ROOT, 0, 0, 2, 3)), "depth") == [0, 1, 2, 3, 4]
    assert reorder(TreeShape((ROOT, 0, 0, 2, 3)), "heavy path") == [0, 2, 3, 4, 1]
