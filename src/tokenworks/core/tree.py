"""Token trees: several continuations of one context, sharing their common prefixes.

A tree is a list of nodes in which a parent comes before its children. `TreeShape` is who hangs where, with
everything that follows from it computed once; `TokenTree` puts a token on each node. The same shape serves
thousands of forward passes, so the two are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tokenworks.core.errors import InputError

ROOT = -1
"""The parent of a node that continues the committed context directly."""


@dataclass(frozen=True)
class TreeShape:
    """Which node hangs under which.

    Args:
        parents: for each of N nodes the number of its parent, or `ROOT`. Nodes are numbered from `first`.
        first: how many pending nodes of a Session precede these; 0 unless a tree is grown in several passes.

    Raises:
        InputError: a parent that does not come before its child.
    """

    parents: tuple[int, ...]
    first: int = 0

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents, start=self.first):
            if not ROOT <= parent < node:
                raise InputError(
                    f"parents: node {node} has parent {parent}; a parent comes before its child "
                    f"(a number from 0 to {node - 1}), or is {ROOT} for the context itself"
                )

    def __len__(self) -> int:
        return len(self.parents)

    @classmethod
    @lru_cache(maxsize=256)
    def chain(cls, length: int, first: int = 0) -> TreeShape:
        """`length` nodes in a row, hanging under the last of the `first` pending nodes."""
        return cls(tuple(range(first - 1, first + length - 1)), first)

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> TreeShape:
        """The tree under one root that a set of rank paths describes; node 0 is the root.

        Args:
            paths: each (i0, i1, ...) means "child i0 of the root, then child i1 of that, ...". Sorted by depth
                and then by rank before numbering, so any order will do.

        Raises:
            InputError: a path is empty, repeated, or its prefix is not in the set; the message names the path.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        number: dict[tuple[int, ...], int] = {(): 0}
        parents = [ROOT]
        for path in ordered:
            if path in number:
                raise InputError(f"tree: path {list(path)} is {'repeated' if path else 'empty'}")
            if path[:-1] not in number:
                raise InputError(f"tree: path {list(path)} needs its prefix {list(path[:-1])} in the tree too")
            if path[-1] < 0:
                raise InputError(f"tree: path {list(path)} has a negative rank")
            number[path] = len(parents)
            parents.append(number[path[:-1]])
        return cls(tuple(parents))

    @cached_property
    def depths(self) -> Tensor:
        """int64 [N]: 0 for a node directly under the context. Only for `first == 0`."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return torch.tensor(depths, dtype=torch.long)

    @cached_property
    def ancestors(self) -> Tensor:
        """bool [N, N]: entry (i, j) says that node j is node i or lies above it. Only for `first == 0`."""
        above = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                above[node] |= above[parent]
        return above

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node the numbers of its children, in order. Only for `first == 0`."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                below[parent].append(node)
        return tuple(map(tuple, below))

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node hangs under the one before it."""
        return self.parents == tuple(range(self.first - 1, self.first + len(self) - 1))

    def path_to(self, node: int) -> list[int]:
        """The nodes from the top of the tree down to `node`, both included."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]


@dataclass(frozen=True)
class TokenTree:
    """A tree with a token on each node.

    Args:
        tokens: int64 [N] token ids.
        shape: where the N nodes hang.
    """

    tokens: Tensor
    shape: TreeShape

    def __post_init__(self) -> None:
        if self.tokens.dim() != 1 or self.tokens.is_floating_point():
            raise InputError(
                f"tokens: expected a 1-D tensor of integer ids, got {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        if len(self.tokens) != len(self.shape):
            raise InputError(f"tokens: {len(self.tokens)} tokens for a tree of {len(self.shape)} nodes")

    def __len__(self) -> int:
        return len(self.shape)

    @classmethod
    def of(cls, tokens: Sequence[int] | Tensor, parents: Sequence[int], first: int = 0) -> TokenTree:
        """Build from plain lists: `tokens[i]` hangs under node `parents[i]` (`ROOT` for the context)."""
        return cls(torch.as_tensor(tokens, dtype=torch.long), TreeShape(tuple(parents), first))
