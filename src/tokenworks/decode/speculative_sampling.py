"""Speculative sampling with one draft (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

The baseline of the family: a draft model writes a chain of tokens, each drawn from its distribution p; the target,
whose distribution is q, accepts a token x with probability min(1, q(x) / p(x)), and at the first rejection draws
from what p leaves of q. (In the letters of SpecTr and RSD, which are used throughout: p draft, q target.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.decode.contract import Draft, Law, Verdict, descend
from tokenworks.decode.draft_model import DraftModel, DraftTree, ModelDrafter


class DraftChain(ModelDrafter):
    """The drafter: one chain of tokens.

    Args:
        model: the draft model.
        length: L >= 1, tokens drafted a pass.

    Raises:
        InputError: length below 1.
    """

    name = "draft-chain"
    law = Law.SINGLE

    def __init__(self, model: DraftModel, length: int = 2) -> None:
        if length < 1:
            raise InputError(f"length: {length} is not at least 1")
        super().__init__(model)
        self.length = length

    def grow(self, tree: DraftTree, room: int) -> Draft:
        node = 0
        for depth in range(1, min(self.length, room) + 1):
            index = torch.multinomial(tree.distributions[node], 1, generator=self.model.generator)
            node = tree.add(node, int(index))
            if depth < min(self.length, room):
                tree.run([node])
        return tree.finish()


class SpeculativeSampling:
    """The verifier of a single chain."""

    name = "speculative-sampling"
    laws = frozenset({Law.SINGLE})

    def verify(
        self, draft: Draft, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        def select(node: int) -> tuple[int, float]:
            q = sampling.distribution(logits[node]).double()
            drawn = draft.drawn(node)
            if drawn:
                assert draft.probabilities is not None
                p = draft.probabilities[node].double()
                x = int(draft.tree.tokens[drawn[0]])
                chance = min(1.0, float(q[x] / p[x]))
                if uniform(generator, q.device) < chance:
                    return x, chance
                q = residual(q, p)
            return pick(q, generator), 1.0

        return descend(draft, select)


def residual(q: Tensor, p: Tensor) -> Tensor:
    """max(q - p, 0), normalised: float64 [V]. q itself where only rounding left nothing."""
    rest = (q - p).clamp(min=0)
    mass = rest.sum()
    return rest / mass if mass > 1e-12 else q


def uniform(generator: torch.Generator | None, device: torch.device) -> float:
    """A draw from [0, 1)."""
    return float(torch.rand((), generator=generator, device=device, dtype=torch.float64))


def pick(p: Tensor, generator: torch.Generator | None) -> int:
    """A draw from p [V]."""
    return int(torch.multinomial(p, 1, generator=generator))
