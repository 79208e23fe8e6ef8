"""The contract of speculative decoding: a Drafter proposes a token tree, a Verifier accepts one path of it.

Any drafter runs with any verifier whose guarantee covers the way its proposals are drawn (`Law`). The verifier
alone answers for the output following the target's distribution; a drafter can only make it slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Reader
from tokenworks.core.tree import TokenTree


class Law(Enum):
    """How the children of a node were drawn; a verifier states which of these it is exact for."""

    FIXED = "a fixed function of what came before"
    SINGLE = "a single draw from the draft distribution"
    INDEPENDENT = "independent draws from the draft distribution"
    WITHOUT_REPLACEMENT = "draws without replacement from the draft distribution"


@dataclass(frozen=True)
class Draft:
    """What a drafter proposes for one target pass.

    Args:
        tree: N >= 1 nodes. Node 0 is the root: the last confirmed token, not yet in the target's cache. All other
            nodes lie under it.
        probabilities: float32 [N, V], for each node the distribution its children were drawn from; rows of nodes
            without children mean nothing. None when the law is FIXED.
        draws: for each node its children in the order in which they were drawn, one of them several times if it
            was; None if that is the order of the tree.
    """

    tree: TokenTree
    probabilities: Tensor | None = None
    draws: Sequence[Sequence[int]] | None = None

    def drawn(self, node: int) -> Sequence[int]:
        """The children of `node` in the order in which they were drawn."""
        return (self.tree.shape.children if self.draws is None else self.draws)[node]


@dataclass(frozen=True)
class Verdict:
    """What a verifier decided about one Draft.

    Args:
        path: the accepted nodes from the root (node 0) downwards; at least the root.
        bonus: the token after the path, drawn by the verifier from the target.
        chances: for each accepted node after the root, the probability in [0, 1] with which it was accepted.
    """

    path: list[int]
    bonus: int
    chances: list[float]


class Drafter(Protocol):
    """Proposes trees. `name` appears in Traces; `law` says how children are drawn."""

    name: str
    law: Law

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> Reader | None:
        """A new sequence begins with these token ids, sampled like this; all draws come from `generator`.

        Returns:
            None, or a function that is to be given the target's logits over the prompt as they are computed.
        """

    def propose(self, context: Sequence[int], room: int) -> Draft:
        """A tree under the last token of `context`, at most `room` (>= 0) levels below the root."""

    def observe(self, draft: Draft, logits: Tensor, verdict: Verdict) -> None:
        """The target's logits [N, V] for the nodes of `draft`, and what was accepted."""


class Verifier(Protocol):
    """Accepts a path so that the output follows the target's distribution, for drafts of the named laws."""

    name: str
    laws: frozenset[Law]

    def verify(
        self, draft: Draft, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        """Choose a path of `draft` and the token after it, given the target's logits [N, V] at its nodes."""


def descend(draft: Draft, select: Callable[[int], tuple[int, float]]) -> Verdict:
    """Walk down from the root for as long as the tree holds what `select` chooses.

    Args:
        select: given a node, the token that follows it in the output, and the chance with which it was taken. Its
            draws must not depend on anything drawn below the node; then going on into whichever child holds the
            token is exact, also if the token was not taken from that child.
    """
    tokens, children = draft.tree.tokens.tolist(), draft.tree.shape.children
    path: list[int] = [0]
    chances: list[float] = []
    while True:
        token, chance = select(path[-1])
        match = next((child for child in children[path[-1]] if tokens[child] == token), None)
        if match is None:
            return Verdict(path, token, chances)
        path.append(match)
        chances.append(chance)


class Autoregressive:
    """The drafter that proposes nothing: plain decoding, one token a pass."""

    name = "autoregressive"
    law = Law.FIXED

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> None:
        """Nothing to prepare."""

    def propose(self, context: Sequence[int], room: int) -> Draft:
        return Draft(TokenTree.of([context[-1]], [-1]))

    def observe(self, draft: Draft, logits: Tensor, verdict: Verdict) -> None:
        """Nothing to learn."""


class TokenMatching:
    """Draw each token from the target, and go on for as long as the tree holds what was drawn.

    At each node y ~ p(. | path); if a child holds y, move there, else y is the bonus token. Every token is a draw
    from the target itself, whatever the tree is, so this is exact for every law; greedy is the case of a
    one-hot p.
    """

    name = "token-matching"
    laws = frozenset(Law)

    def verify(
        self, draft: Draft, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        # One argmax over all rows is cheaper than one at each node that the walk visits.
        greedy = logits.argmax(-1).tolist() if sampling.greedy else None

        def select(node: int) -> tuple[int, float]:
            if greedy is not None:
                return greedy[node], 1.0
            p = sampling.distribution(logits[node])
            token = int(torch.multinomial(p, 1, generator=generator))
            return token, float(p[token])

        return descend(draft, select)
