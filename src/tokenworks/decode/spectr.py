"""SpecTr (Sun et al., arXiv 2310.15141): several independent drafts, and selection as optimal transport.

k candidates are drawn independently from the draft's p; the output must follow the target's q and should be one
of them as often as possible. The best coupling is a linear program with V^(k+1) variables (`optimal_plan`). K-SEQ,
the paper's selection, comes within 1 - 1/e of it in time almost linear in V: it looks at the candidates in turn
and takes x with probability min(1, q(x) / (rho p(x))), where rho is the smallest factor that leaves a proper
residual.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.decode.contract import Draft, Law, Verdict, descend
from tokenworks.decode.draft_model import DraftModel, DraftTree, ModelDrafter
from tokenworks.decode.speculative_sampling import pick, uniform

LARGEST_PLAN = 10_000
"""Most tuples of candidates V^k that `optimal_plan` takes on."""


class IndependentDrafts(ModelDrafter):
    """The drafter: K chains of L tokens, drawn independently; what they share is run and scored once.

    Args:
        model: the draft model.
        drafts: K >= 1.
        length: L >= 1.

    Raises:
        InputError: drafts or length below 1.
    """

    name = "independent-drafts"
    law = Law.INDEPENDENT

    def __init__(self, model: DraftModel, drafts: int = 4, length: int = 3) -> None:
        if drafts < 1 or length < 1:
            raise InputError(f"drafts: {drafts} and length: {length} must be at least 1")
        super().__init__(model)
        self.drafts, self.length = drafts, length

    def grow(self, tree: DraftTree, room: int) -> Draft:
        draws: list[list[int]] = [[]]
        level = {0: self.drafts}  # for each node, how many of the chains go through it
        for depth in range(min(self.length, room)):
            if depth:
                tree.run(list(level))
            passing: dict[int, int] = {}
            for node, count in level.items():
                p = tree.distributions[node]
                children: dict[int, int] = {}
                for index in torch.multinomial(p, count, True, generator=self.model.generator).tolist():
                    if index not in children:
                        children[index] = tree.add(node, index)
                        draws.append([])
                    draws[node].append(children[index])
                    passing[children[index]] = passing.get(children[index], 0) + 1
            level = passing
        return tree.finish(draws=draws)


class KSequential:
    """The verifier (Algorithm 3, K-SEQ), exact for k independent candidates; k = 1 is speculative sampling.

    The number of candidates at a node is the number of chains that have survived so far, repeats included.
    """

    name = "k-seq"
    laws = frozenset({Law.SINGLE, Law.INDEPENDENT})

    def verify(
        self, draft: Draft, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        def select(node: int) -> tuple[int, float]:
            q = sampling.distribution(logits[node]).double()
            drawn = draft.drawn(node)
            if not drawn:
                return pick(q, generator), 1.0
            assert draft.probabilities is not None
            p = draft.probabilities[node].double()
            rho = division_parameter(p, q, len(drawn))
            for child in drawn:
                x = int(draft.tree.tokens[child])
                chance = min(1.0, float(q[x] / (rho * p[x])))
                if uniform(generator, q.device) < chance:
                    return x, chance
            return pick(leftover(p, q, len(drawn), rho), generator), 1.0

        return descend(draft, select)


def division_parameter(p: Tensor, q: Tensor, k: int, steps: int = 50) -> float:
    """rho*, the root in [1, k] of 1 - (1 - beta(rho))^k = rho beta(rho) with beta(rho) = sum_x min(p, q / rho).

    By bisection; the upper end is returned, where the residual has no negative mass.

    Args:
        p, q: float64 [V], draft and target.
        k: number of candidates, at least 1.
    """
    possible = p > 0
    p, q = p[possible], q[possible]
    low, high = 1.0, float(k)
    while steps and high - low > 1e-12:
        middle = (low + high) / 2
        beta = float(torch.minimum(p, q / middle).sum())
        if 1 - (1 - beta) ** k <= middle * beta:
            high = middle
        else:
            low = middle
        steps -= 1
    return high


def leftover(p: Tensor, q: Tensor, k: int, rho: float) -> Tensor:
    """What q still needs once all k candidates were turned down: float64 [V], normalised.

    p_res = (q - min(p, q / rho) p_acc / beta) / (1 - beta)^k with p_acc = 1 - (1 - beta)^k. Where beta is 0,
    nothing can be accepted and it is q.
    """
    taken = torch.minimum(p, q / rho)
    beta = float(taken.sum())
    # (1 - (1 - beta)^k) / beta as a sum of powers, which has no 0 / 0.
    rest = (q - taken * sum((1 - beta) ** j for j in range(k))).clamp(min=0)
    mass = rest.sum()
    return rest / mass if mass > 1e-12 else q


def acceptance(p: Tensor, q: Tensor, k: int) -> float:
    """Probability that K-SEQ outputs one of k candidates; at least 1 - (1 - 1/k)^k of `optimal_acceptance`."""
    beta = float(torch.minimum(p, q / division_parameter(p, q, k)).sum())
    return 1 - (1 - beta) ** k


def optimal_acceptance(p: Tensor, q: Tensor, k: int) -> float:
    """The best acceptance of any selection from k independent candidates, without the linear program.

    By duality it is the least of q(S) + 1 - p(S)^k over all sets S, found at one that takes tokens by ascending
    q / p (max-flow and min-cut; arXiv 2502.18779).

    Args:
        p, q: float64 [V], draft and target.
    """
    order = torch.where(p > 0, q / p, torch.inf).argsort()
    zero = torch.zeros(1, dtype=torch.float64)
    inside_q, inside_p = (torch.cat([zero, x[order].cumsum(0)]) for x in (q, p))
    return min(1.0, float((inside_q + 1 - inside_p**k).min()))


def optimal_plan(p: Tensor, q: Tensor, k: int) -> tuple[float, np.ndarray]:
    """The optimal transport plan with membership cost, by linear programming (HiGHS).

    Args:
        p, q: float64 [V], draft and target.

    Returns:
        The acceptance, and the plan float64 [V^k, V]: the joint probability of each tuple of candidates, in
        lexicographic order, and each output.

    Raises:
        InputError: more than `LARGEST_PLAN` tuples; `optimal_acceptance` has no such limit.
    """
    vocabulary = len(p)
    if vocabulary**k > LARGEST_PLAN:
        raise InputError(f"k: {vocabulary}^{k} tuples are too many for a linear program; use optimal_acceptance")
    tuples = list(itertools.product(range(vocabulary), repeat=k))
    given = np.array([float(torch.prod(p[list(x)])) for x in tuples])
    # Variable (i, y) has number i V + y. Rows sum to the tuples' probabilities, columns to q; one column follows
    # from the rest.
    number = np.arange(len(tuples) * vocabulary)
    i, y = number // vocabulary, number % vocabulary
    free = y < vocabulary - 1
    rows = np.concatenate([i, len(tuples) + y[free]])
    shape = (len(tuples) + vocabulary - 1, len(number))
    constraints = coo_array((np.ones(len(rows)), (rows, np.concatenate([number, number[free]]))), shape)
    inside = np.array([float(out in x) for x in tuples for out in range(vocabulary)])
    found = linprog(
        -inside, A_eq=constraints.tocsr(), b_eq=np.concatenate([given, q.numpy()[:-1]]), method="highs"
    )
    return -float(found.fun), found.x.reshape(len(tuples), vocabulary)
