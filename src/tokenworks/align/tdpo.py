"""TDPO: token-level direct preference optimisation (arXiv 2404.11999).

DPO's margin, and besides it how far the policy has moved from the reference over the whole vocabulary at every
token of the two responses. With m = sum_t log(policy / reference)(y_t) and D = sum_t KL(reference || policy)(s_t):

    TDPO1   u = (m_w - m_l) - (D_l - D_w)
    TDPO2   u = (m_w - m_l) - alpha (D_l - stop(D_w))
    loss  = -log sigmoid(beta u)

Where it comes from: the advantage of a token under the reference is beta (log ratio + KL(reference || policy)),
and a response is preferred by the sum of its advantages. TDPO1 is that; but its loss also falls when D_w grows,
which pushes the policy away on preferred text. TDPO2 stops that gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tokenworks.align.contract import (
    Needs,
    Outcome,
    Pairs,
    check_not_negative,
    check_positive,
    halves,
    required,
)
from tokenworks.core.errors import InputError

VARIANTS = ("tdpo1", "tdpo2")


class TDPO:
    """The loss.

    Args:
        beta: above 0.
        alpha: weight of the divergences in TDPO2, from 0 upwards; with 0 it is DPO. TDPO1 has none.
        variant: one of `VARIANTS`. The authors advise TDPO2 at high learning rates, TDPO1 at low ones.

    Raises:
        InputError: a number out of range, or no such variant.
    """

    needs = Needs(divergence=True)

    def __init__(self, beta: float = 0.1, alpha: float = 0.5, variant: str = "tdpo2") -> None:
        check_positive(beta=beta)
        check_not_negative(alpha=alpha)
        if variant not in VARIANTS:
            raise InputError(f"variant: no {variant!r}; there are {', '.join(VARIANTS)}")
        self.beta, self.alpha, self.variant = beta, alpha, variant

    def __call__(self, pairs: Pairs) -> Outcome:
        divergence = required(pairs.divergence, "divergence")
        m_w, m_l = halves(pairs.log_ratio.sum(1))
        d_w, d_l = halves(divergence.sum(1))
        further = d_l - d_w if self.variant == "tdpo1" else self.alpha * (d_l - d_w.detach())
        u = (m_w - m_l) - further
        advantages = token_advantages(pairs, self.beta).detach()
        return Outcome(
            -logsigmoid(self.beta * u),
            advantages.sum(1),
            {"advantage": advantages, "reward": self.beta * pairs.log_ratio.detach(), "kl": divergence.detach()},
            {
                "advantage": "beta (log ratio + KL): what the policy takes the token to be worth",
                "reward": "beta log(policy / reference) of the token, in nats",
                "kl": "KL(reference || policy) over the vocabulary at the token, in nats",
            },
            {"kl/chosen": float(d_w.detach().mean()), "kl/rejected": float(d_l.detach().mean())},
        )


def token_advantages(pairs: Pairs, beta: float) -> Tensor:
    """beta (log ratio + KL(reference || policy)) of every token: float32 [2B, T], 0 outside the responses."""
    return beta * (pairs.log_ratio + required(pairs.divergence, "divergence"))
