"""RSD, recursive speculative decoding (Jeon et al., arXiv 2402.14160): sampling without replacement.

The children of a node are drawn without replacement, so that no two are the same and none is wasted. Two drafters:
RSD-C gives each node of a level the same number of children, by the Gumbel-top-k trick; RSD-S keeps the W best
paths of a level by stochastic beam search, which is sampling without replacement of whole paths. One verifier,
recursive rejection sampling: each child in the order of the draws, against what those before it left over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.decode.contract import Draft, Law, Verdict, descend
from tokenworks.decode.draft_model import DraftModel, DraftTree, ModelDrafter
from tokenworks.decode.speculative_sampling import pick, residual, uniform


class RecursiveRejection:
    """The verifier: exact for children drawn without replacement, tested in the order in which they were drawn.

    With p_1 = p and q_1 = q: child x_j is accepted with probability min(1, q_j(x_j) / p_j(x_j)); if it is not,
    q_{j+1} = norm(max(q_j - p_j, 0)), and p_{j+1} is p_j without x_j, normalised. With no child left, the token
    is drawn from the last q.

    Args:
        replacement: for independent draws instead: p_j stays p, and a token may come again. That is SpecInfer's
            multi-step sampling (arXiv 2305.09781), the baseline.
    """

    def __init__(self, replacement: bool = False) -> None:
        self._replacement = replacement
        self.name = "multi-step" if replacement else "recursive-rejection"
        self.laws = frozenset({Law.SINGLE, Law.INDEPENDENT if replacement else Law.WITHOUT_REPLACEMENT})

    def verify(
        self, draft: Draft, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        def select(node: int) -> tuple[int, float]:
            q = sampling.distribution(logits[node]).double()
            drawn = draft.drawn(node)
            if drawn:
                assert draft.probabilities is not None
                p = draft.probabilities[node].double()
            for child in drawn:
                x = int(draft.tree.tokens[child])
                chance = min(1.0, float(q[x] / p[x]))
                if uniform(generator, q.device) < chance:
                    return x, chance
                q = residual(q, p)
                if not self._replacement:
                    p = without(p, x)
            return pick(q, generator), 1.0

        return descend(draft, select)


def without(p: Tensor, x: int) -> Tensor:
    """p [V] with the mass of x removed, normalised; all zeros if nothing else is left."""
    rest = p.clone()
    rest[x] = 0
    return rest / rest.sum().clamp(min=torch.finfo(p.dtype).tiny)


class ConstantBranching(ModelDrafter):
    """RSD-C, the drafter: every node of level l has `branching[l]` distinct children (Gumbel-top-k).

    Args:
        model: the draft model.
        branching: b_0, b_1, ..., each at least 1; the tree has b_0 + b_0 b_1 + ... nodes under its root. A node
            has fewer children where the draft's distribution (top-p, say) has fewer tokens.

    Raises:
        InputError: an empty branching, or an entry below 1.
    """

    name = "rsd-c"
    law = Law.WITHOUT_REPLACEMENT

    def __init__(self, model: DraftModel, branching: Sequence[int] = (3, 2)) -> None:
        if not branching or min(branching) < 1:
            raise InputError(f"branching: {list(branching)} must be numbers of at least 1, one for each level")
        super().__init__(model)
        self.branching = tuple(branching)

    def grow(self, tree: DraftTree, room: int) -> Draft:
        level = [0]
        for depth, count in enumerate(self.branching[:room]):
            if depth:
                tree.run(level)
            log_p = torch.stack([tree.distributions[node] for node in level]).log()
            chosen, values = gumbel_top_k(log_p, count, self.model.generator)
            level = [
                tree.add(node, index)
                for node, row, kept in zip(level, chosen.tolist(), values.tolist(), strict=True)
                for index, value in zip(row, kept, strict=True)
                if value > -torch.inf
            ]
        return tree.finish()


class StochasticBeam(ModelDrafter):
    """RSD-S, the drafter: the `width` best paths of each level by stochastic beam search.

    Args:
        model: the draft model.
        width: W >= 1 paths.
        depth: L >= 1 levels; the tree has at most W L nodes under its root.

    Raises:
        InputError: width or depth below 1.
    """

    name = "rsd-s"
    law = Law.WITHOUT_REPLACEMENT

    def __init__(self, model: DraftModel, width: int = 5, depth: int = 2) -> None:
        if width < 1 or depth < 1:
            raise InputError(f"width: {width} and depth: {depth} must be at least 1")
        super().__init__(model)
        self.width, self.depth = width, depth

    def grow(self, tree: DraftTree, room: int) -> Draft:
        beam = [0]
        phi, g = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for depth in range(min(self.depth, room)):
            if depth:
                tree.run(beam)
            log_p = torch.stack([tree.distributions[node] for node in beam]).double().log()
            phi_x, g_x = beam_step(phi, g, log_p, self.model.generator)
            best, places = g_x.flatten().topk(min(self.width, g_x.numel()))
            places = places[best > -torch.inf]
            phi, g = phi_x.flatten()[places], g_x.flatten()[places]
            width = log_p.shape[1]
            beam = [tree.add(beam[place // width], place % width) for place in places.tolist()]
        return tree.finish()


def gumbel_top_k(log_p: Tensor, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """k draws without replacement from each row, in the order of the draws.

    Args:
        log_p: float [..., V]; -inf where a token cannot be drawn.

    Returns:
        The tokens int64 [..., k] and their perturbed log-probabilities [..., k], descending; k is cut to V, and
        the value is -inf where there was nothing left to draw.
    """
    perturbed = log_p + _gumbel(log_p, generator)
    values, tokens = perturbed.topk(min(k, log_p.shape[-1]), dim=-1)
    return tokens, values


def beam_step(
    phi: Tensor, g: Tensor, log_p: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One level of stochastic beam search: perturbed log-probabilities of children, given their parents'.

    Args:
        phi: float64 [B], log-probability of each path of the beam.
        g: float64 [B], its perturbed log-probability.
        log_p: float64 [B, V], of the next token after each.

    Returns:
        For every child its log-probability [B, V] and its perturbed one [B, V], drawn so that the largest among
        siblings is their parent's g (a truncated Gumbel, Kool et al., arXiv 1903.06059).
    """
    phi_x = phi[:, None] + log_p
    raw = phi_x + _gumbel(phi_x, generator)
    largest = raw.amax(-1, keepdim=True)
    # exp(-raw) <- exp(-g) - exp(-largest) + exp(-raw), arranged so that nothing overflows.
    v = g[:, None] - raw + torch.log1p(-torch.exp(raw - largest))
    return phi_x, g[:, None] - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty_like(like).exponential_(generator=generator)
    return -noise.clamp_(min=torch.finfo(like.dtype).tiny).log_()
