"""Parallel prompt decoding (Chen et al., "Hardware-Aware Parallel Prompt Decoding", arXiv 2405.18628).

m trained embeddings S_1 .. S_m, put behind a text, let the frozen model say at once what it would say later: its
own last logits give token 1, those of S_i guess token i + 1. One pass guesses, verifies and guesses again:

    root          the last confirmed token
    candidates    rank j of guess i on level i, the same under every parent
    prompts       under each of these nodes v a chain of c_v prompts, whose guesses serve the next pass
                  if v is the last node accepted

Which candidates a tree holds and how many prompts hang under each is chosen for a budget of slots from the
accuracy table A, A[i][j] the probability that rank j of guess i is right; and the budget from what a pass costs on
this machine. The text is the target's own whatever the embeddings and the table say.

Nothing is guessed yet when a generation begins, so its first pass holds the root and its prompts only. The
official code has the prompts read behind the user's prompt instead, one pass fewer for each generation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tokenworks.core.cost import CostCurve
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling, top_ids
from tokenworks.core.tree import TokenTree, TreeShape
from tokenworks.decode.contract import Draft, Law, Verdict

RankPath = tuple[int, ...]
Floats = NDArray[np.float64]

BUDGETS = (*range(1, 17), 20, 24, 32, 48, 64, 81, 105)
"""Slots of a pass to choose among; the last is of the size that the official repository runs on its GPU."""


@dataclass(frozen=True)
class SparseTree:
    """T_k, the tree for the state in which k guesses are known.

    Attributes:
        paths: of the s candidates, each the ranks from the first level down, shortest first.
        last: [s + 1], for the root and each candidate q(v), the probability that it is the last node accepted.
        prompts: for the root and each candidate c_v, the prompts under it.
    """

    paths: tuple[RankPath, ...]
    last: tuple[float, ...]
    prompts: tuple[int, ...]

    def __len__(self) -> int:
        """Slots of a pass."""
        return len(self.last) + sum(self.prompts)


@dataclass(frozen=True)
class DynamicTrees:
    """The trees of all states, and where they lead.

    Attributes:
        trees: T_0 to T_m.
        accepted: f(T_k), the candidates accepted from state k on average, [m + 1].
        transitions: P(k -> c), [m + 1, m + 1]: the sum of q(v) over the nodes of T_k with c prompts.
    """

    trees: tuple[SparseTree, ...]
    accepted: Floats
    transitions: Floats

    @property
    def stationary(self) -> Floats:
        """The share of passes made in each state [m + 1], in a long text that begins in state 0."""
        # Staying put every other time changes no shares, and lets the powers converge where states alternate.
        lazy = (self.transitions + np.eye(len(self.trees))) / 2
        shares: Floats = np.linalg.matrix_power(lazy, 1 << 12)[0]
        return shares

    @property
    def tokens_per_pass(self) -> float:
        """tau = 1 + sum_k pi_k f(T_k)."""
        return 1 + float(self.stationary @ self.accepted)

    def seconds_per_pass(self, cost: CostCurve) -> float:
        """The mean over states of what a pass over their tree costs."""
        return float(self.stationary @ [cost(len(tree)) for tree in self.trees])


def dynamic_trees(accuracy: ArrayLike, budget: int) -> DynamicTrees:
    """The trees with the most tokens a pass, sought from equal numbers of candidates by changing one at a time.

    The candidates of T_k are those of depth <= k with the largest product of accuracies, which is the best set of
    their number. Prompts are taken away where it costs least, q(v) (f(T_c) - f(T_c-1)), until the tree fits the
    budget. The official code leaves every candidate at least one prompt, and the root all; with f(T_0) = 0 the
    same rule also decides about those, which small budgets need.

    Args:
        accuracy: [m, ranks], A[i][j] = P(the token i + 2 ahead is rank j of guess i), i and j from 0.
        budget: slots of a pass in all, root and prompts included; at least 1, which is plain decoding.

    Raises:
        InputError: a budget below 1, or a table that is not one of probabilities.
    """
    table = np.asarray(accuracy, dtype=np.float64)
    if table.ndim != 2 or not (table >= 0).all() or (table.sum(1) > 1 + 1e-4).any():
        raise InputError("accuracy: expected [m, ranks] probabilities, each row summing to at most 1")
    if budget < 1:
        raise InputError(f"budget: {budget} is not at least 1; the root takes a slot")
    search = _Search(table, budget)
    sizes = max(([size] * len(table) for size in range(budget)), key=lambda s: search.trees(s).tokens_per_pass)
    best = search.trees(sizes)
    improved = True
    while improved:
        improved = False
        for state, size in itertools.product(range(len(sizes)), range(budget)):
            other = [*sizes[:state], size, *sizes[state + 1 :]]
            found = search.trees(other)
            if found.tokens_per_pass > best.tokens_per_pass + 1e-9:
                best, sizes, improved = found, other, True
    return best


class _Search:
    """What all choices of sizes have in common: the candidates of each state, best first."""

    def __init__(self, table: Floats, budget: int) -> None:
        self._budget, self._prompts = budget, len(table)
        self._ranked: list[list[tuple[float, RankPath]]] = [[]]
        paths: list[RankPath] = [()]
        level: list[RankPath] = [()]
        for _ in table:
            level = [(*path, rank) for path in level for rank in range(table.shape[1])]
            paths += level
            # A path comes before what hangs under it, also where a product does not fall.
            ranked = sorted(paths[1:], key=lambda path: (-_chance(table, path), len(path), path))
            self._ranked.append([(_chance(table, path), path) for path in ranked[: budget - 1]])

    def trees(self, sizes: Sequence[int]) -> DynamicTrees:
        """T_0 without candidates, T_1 to T_m with the given numbers of them."""
        chosen = [ranked[:size] for ranked, size in zip(self._ranked, [0, *sizes], strict=True)]
        accepted = np.array([sum(chance for chance, _ in part) for part in chosen])
        trees = [self._tree(part, accepted) for part in chosen]
        transitions = np.zeros((len(trees), len(trees)))
        for state, tree in enumerate(trees):
            np.add.at(transitions[state], list(tree.prompts), tree.last)
        return DynamicTrees(tuple(trees), accepted, transitions)

    def _tree(self, candidates: list[tuple[float, RankPath]], accepted: Floats) -> SparseTree:
        last: dict[RankPath, float] = {(): 1.0}
        for chance, path in sorted(candidates, key=lambda found: (len(found[1]), found[1])):
            last[path] = chance
            last[path[:-1]] -= chance
        q = np.maximum(list(last.values()), 0)
        # Prompt c of a node goes before its prompt c - 1, which then is worth at least as much to the order of
        # removal: so that order is one sorted list.
        worth = np.maximum.accumulate(np.diff(accepted)[::-1])[::-1]
        keys = np.outer(worth, q).flatten()
        kept = np.argsort(-keys, kind="stable")[: self._budget - len(q)]
        prompts = np.bincount(kept % len(q), minlength=len(q))
        return SparseTree(tuple(last)[1:], tuple(q.tolist()), tuple(prompts.tolist()))


def _chance(table: Floats, path: RankPath) -> float:
    """acc(path): the product of the accuracies along it."""
    return float(np.prod([table[level, rank] for level, rank in enumerate(path)]))


def choose_budget(accuracy: ArrayLike, cost: CostCurve, budgets: Iterable[int] = BUDGETS) -> int:
    """The budget that decodes fastest on this machine: most tokens a pass for what its passes cost.

    Args:
        accuracy: as in `dynamic_trees`.
        cost: seconds of a pass against its width.
        budgets: slots of a pass, each at least 1.
    """

    def speed(budget: int) -> float:
        found = dynamic_trees(accuracy, budget)
        return found.tokens_per_pass / found.seconds_per_pass(cost)

    return max(budgets, key=speed)


class PromptTokens:
    """The drafter, for a session that was given the prompts: `first_id = session.add_inputs(embeddings)`.

    Args:
        first_id: the input id of S_1; S_i has id first_id + i - 1.
        accuracy: [m, ranks], as in `dynamic_trees`.
        budget: slots of a pass, at least 1.

    Attributes:
        trees: what is drafted.

    Raises:
        InputError: as `dynamic_trees`.
    """

    name = "prompt-tokens"
    law = Law.FIXED

    def __init__(self, first_id: int, accuracy: ArrayLike, budget: int) -> None:
        self.trees = dynamic_trees(accuracy, budget)
        self._first_id = first_id
        self._ranks = 1 + max((max(path) for tree in self.trees.trees for path in tree.paths), default=0)
        self._guesses = torch.empty(0, self._ranks, dtype=torch.long)
        """[k, ranks]: the best tokens of each guess that the last pass left."""

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> None:
        """Nothing is guessed yet: state 0."""
        self._guesses = self._guesses[:0]

    def propose(self, context: Sequence[int], room: int) -> Draft:
        """T_k filled from the guesses, without what would reach deeper than `room`, prompts included."""
        layout = self._layout(room)
        tokens = torch.empty(len(layout.shape), dtype=torch.long)
        tokens[0] = context[-1]
        tokens[layout.candidates] = self._guesses[layout.levels, layout.ranks]
        tokens[layout.prompts] = self._first_id + layout.numbers
        return Draft(TokenTree(tokens, layout.shape))

    def observe(self, draft: Draft, logits: Tensor, verdict: Verdict) -> None:
        """The prompts under the last node accepted give the next guesses; the state is their number."""
        slots = _below(draft.tree, verdict.path[-1], self._first_id)
        self._guesses = top_ids(logits[slots], self._ranks).cpu() if slots else self._guesses[:0]

    def _layout(self, room: int) -> _Layout:
        tree = self.trees.trees[len(self._guesses)]
        return _Layout.of(tree, min(room, 2 * len(self.trees.trees)))


def _below(tree: TokenTree, node: int, first_id: int) -> list[int]:
    """The chain of prompts under a node, from the top."""
    chain: list[int] = []
    while True:
        children = tree.shape.children[chain[-1] if chain else node]
        found = [child for child in children if int(tree.tokens[child]) >= first_id]
        if not found:
            return chain
        chain += found


class _Layout:
    """A SparseTree cut to a depth: its shape, and where what goes. Candidates come before all prompts."""

    def __init__(self, tree: SparseTree, room: int) -> None:
        paths = [path for path in tree.paths if len(path) <= room]
        parents = list(TreeShape.from_paths(paths).parents)
        numbers: list[int] = []
        for node, (path, count) in enumerate(zip([(), *paths], tree.prompts, strict=False)):
            above = node
            for number in range(min(count, room - len(path))):
                parents.append(above)
                numbers.append(number)
                above = len(parents) - 1
        self.shape = TreeShape(tuple(parents))
        self.candidates, self.prompts = slice(1, len(paths) + 1), slice(len(paths) + 1, None)
        self.levels = torch.tensor([len(path) - 1 for path in paths], dtype=torch.long)
        self.ranks = torch.tensor([path[-1] for path in paths], dtype=torch.long)
        self.numbers = torch.tensor(numbers, dtype=torch.long)

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, tree: SparseTree, room: int) -> _Layout:
        return cls(tree, room)
