"""DySpec (Xiong et al., arXiv 2410.11744): a token tree grown where the draft is most confident.

A slot is "the next child to draw under a node"; its value is the estimated probability that verification comes
to it. A child y drawn from what is left of the draft's distribution, R, is accepted with probability about R[y]:
so a slot of value v gives its child's first slot v R[y], and the next sibling's slot v (1 - R[y]). Values fall
along every branch, so drawing from the slot of the largest value next gives the best tree of any size.

Children are draws without replacement, verified by recursive rejection in the order of the draws. Whether a slot
is drawn from may depend on all values known before the draw, never on the token: a child, once drawn, stays.

A tree grown this way has its nodes in no particular order, and its attention mask is scattered. `reorder` brings
branches together, so that a block-sparse kernel would have fewer blocks to compute (`nonzero_blocks`); the dense
attention of a CPU gains nothing, so the decoder leaves trees as they grew.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Literal

import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.tree import ROOT, TreeShape
from tokenworks.decode.contract import Draft, Law
from tokenworks.decode.draft_model import DraftModel, DraftTree, ModelDrafter
from tokenworks.decode.rsd import gumbel_top_k

TOGETHER = 6
"""Nodes run in one pass of the draft when one of them is needed: a pass of six costs hardly more than of one."""

LEAST_MASS = 1e-9
"""With less than this left of a distribution, no further sibling is drawn."""


class _Slots:
    """The children of one node, in the order of the draws, and what remains for the next."""

    def __init__(self, p: Tensor, most: int, drawn: bool, generator: torch.Generator | None) -> None:
        if drawn:
            order, values = gumbel_top_k(p.log(), most, generator)
            order = order[values > -torch.inf]
        else:
            order = p.topk(min(most, len(p))).indices
            order = order[p[order] > 0]
        self._order, self._chances = order.tolist(), p[order].double().tolist()
        self._drawn, self._taken, self.left = drawn, 0, 1.0

    def draw(self) -> tuple[int, float]:
        """The next child, and R[child]: its share of what earlier draws have left."""
        index, chance = self._order[self._taken], self._chances[self._taken]
        share = min(1.0, chance / self.left)
        self._taken += 1
        self.left -= chance
        return index, share

    @property
    def empty(self) -> bool:
        return self._taken == len(self._order) or self.left < LEAST_MASS


class DynamicTree(ModelDrafter):
    """The drafter.

    Args:
        model: the draft model.
        budget: N >= 1, most nodes under the root.
        depth: D >= 1, most levels.
        threshold: tau in (0, 1). None is Algorithm 1: always draw from the slot of the largest value, `budget`
            times. A number is Algorithm 2: level by level, from every slot whose value is above it; the draft
            model then runs once a level.
        children: "drawn" without replacement, for recursive rejection; or "best", the draft's likeliest tokens in
            order, which only token matching verifies exactly and which suits greedy decoding.

    Attributes:
        estimates: for each node of the last tree the estimated probability that it is accepted; the root has 1.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        model: DraftModel,
        budget: int = 11,
        depth: int = 3,
        threshold: float | None = None,
        children: Literal["drawn", "best"] = "drawn",
    ) -> None:
        if budget < 1 or depth < 1:
            raise InputError(f"budget: {budget} and depth: {depth} must be at least 1")
        if threshold is not None and not 0 < threshold < 1:
            raise InputError(f"threshold: {threshold} is not between 0 and 1")
        super().__init__(model)
        self.budget, self.depth, self.threshold = budget, depth, threshold
        self._drawn = children == "drawn"
        self.law = Law.WITHOUT_REPLACEMENT if self._drawn else Law.FIXED
        self.name = "dyspec" if self._drawn else "dyspec-best"
        if threshold is not None:
            self.name += "-threshold"
        self.estimates: list[float] = [1.0]

    def grow(self, tree: DraftTree, room: int) -> Draft:
        self.estimates = [1.0]
        grow = self._by_value if self.threshold is None else self._by_level
        grow(tree, min(self.depth, room))
        return tree.finish(self._drawn)

    def _slots(self, tree: DraftTree, node: int) -> _Slots:
        return _Slots(tree.distributions[node], self.budget, self._drawn, self.model.generator)

    def _by_value(self, tree: DraftTree, depth: int) -> None:
        """Algorithm 1. Equal values are drawn from in the order in which they came up."""
        ticket = itertools.count()
        heap: list[tuple[float, int, int]] = [(-1.0, next(ticket), 0)] if depth else []
        slots: dict[int, _Slots] = {}
        while heap and len(tree) - 1 < self.budget:
            value, _, node = heapq.heappop(heap)
            if node not in tree.distributions:
                waiting = [n for _, _, n in heapq.nsmallest(4 * TOGETHER, heap) if n not in tree.distributions]
                tree.run([node, *waiting[: TOGETHER - 1]])
            if node not in slots:
                slots[node] = self._slots(tree, node)
            index, share = slots[node].draw()
            child = tree.add(node, index)
            self.estimates.append(-value * share)
            if not slots[node].empty and share < 1:
                heapq.heappush(heap, (value * (1 - share), next(ticket), node))
            if tree.depths[child] < depth:
                heapq.heappush(heap, (value * share, next(ticket), child))

    def _by_level(self, tree: DraftTree, depth: int) -> None:
        """Algorithm 2."""
        assert self.threshold is not None
        level = [0]
        for _ in range(depth):
            if level != [0]:
                tree.run(level)
            below = []
            for node in level:
                slots, value = self._slots(tree, node), self.estimates[node]
                while value > self.threshold and not slots.empty and len(tree) - 1 < self.budget:
                    index, share = slots.draw()
                    child = tree.add(node, index)
                    self.estimates.append(value * share)
                    if value * share > self.threshold:
                        below.append(child)
                    value *= 1 - share
            level = below
            if not level or len(tree) - 1 >= self.budget:
                return


def reorder(shape: TreeShape, by: Literal["depth", "heavy path"] = "heavy path") -> list[int]:
    """The nodes of a tree, branch by branch; every node still comes after its parent.

    Args:
        by: "depth" goes depth first through children in their order; "heavy path" takes the child with the most
            nodes below it first, so that the longest paths lie together.
    """
    below = [1] * len(shape)
    for node in reversed(range(len(shape))):
        if shape.parents[node] != ROOT:
            below[shape.parents[node]] += below[node]
    order: list[int] = []
    waiting = [node for node, parent in enumerate(shape.parents) if parent == ROOT][::-1]
    while waiting:
        order.append(waiting.pop())
        children = list(shape.children[order[-1]])
        if by == "heavy path":
            children.sort(key=lambda child: -below[child])
        waiting += reversed(children)
    return order


def nonzero_blocks(mask: Tensor, block: int = 32) -> int:
    """How many blocks of `block` x `block` a kernel that skips empty ones has to compute.

    Args:
        mask: bool [N, M], true where a node looks.
        block: at least 1; blocks at the edges may be smaller.
    """
    rows, columns = (-(-length // block) for length in mask.shape)
    return sum(
        bool(mask[row * block : (row + 1) * block, column * block : (column + 1) * block].any())
        for row, column in itertools.product(range(rows), range(columns))
    )
