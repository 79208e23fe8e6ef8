"""TGDPO: DPO guided by token-level rewards (arXiv 2506.14574).

A model that is aligned already says of every token how much it likes it, g_t = log(guide / reference)(y_t). Tokens
that it likes in the chosen response, and dislikes in the rejected one, may move further from the reference:

    h    = sum_t beta (1 + alpha beta g_t) log_ratio_t      over the chosen response
         - sum_t beta (1 - alpha beta g_t) log_ratio_t      over the rejected one
    loss = -log sigmoid(h)

The weights are numbers, not functions of the policy. In the derivation beta becomes beta f(r_t) with f > 0 near 1,
and a term that then no longer cancels is shown to leave the direction of ascent of a pair as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
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

Factor = Callable[[Tensor], Tensor]
"""f of the derivation: from token rewards to what beta is scaled by, float [...] to [...]; above 0 and near 1."""


class TGDPO:
    """The loss.

    Args:
        beta: above 0.
        alpha: from 0 upwards; how far the guide is followed. 0 is DPO.
        min_weight: weights are raised to this, if given; the derivation wants them above 0, the authors let them
            be.
        f_chosen, f_rejected: other functions of the token rewards r in place of 1 + alpha r and 1 - alpha r.

    The data's scores are the guide's token rewards, beta log(guide / reference) (`align.scores.guide_rewards`), or
    those of any other model of token rewards.

    Raises:
        InputError: a number out of range.
    """

    needs = Needs(scores="token rewards of a guide (align.scores.guide_rewards)")

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        min_weight: float | None = None,
        f_chosen: Factor | None = None,
        f_rejected: Factor | None = None,
    ) -> None:
        check_positive(beta=beta)
        check_not_negative(alpha=alpha)
        self.beta, self.alpha, self.min_weight = beta, alpha, min_weight
        self.f_chosen: Factor = f_chosen or (lambda r: 1 + alpha * r)
        self.f_rejected: Factor = f_rejected or (lambda r: 1 - alpha * r)

    def __call__(self, pairs: Pairs) -> Outcome:
        weights = self.weights(pairs)
        chosen, rejected = halves((self.beta * weights * pairs.log_ratio).sum(1))
        rewards = self.beta * pairs.log_ratio.detach()
        spoilt = float((weights[pairs.mask] <= 0).float().mean())
        if spoilt:
            warnings.warn(
                f"{spoilt:.1%} of the weights are not above 0, where the derivation no longer holds and a token "
                "is pushed the wrong way; lower alpha, or set min_weight",
                stacklevel=2,
            )
        return Outcome(
            -logsigmoid(chosen - rejected),
            rewards.sum(1),
            {"weight": weights, "guide": required(pairs.scores, "scores").detach(), "reward": rewards},
            {
                "weight": "by which the guide scales beta at this token; 1 is DPO",
                "guide": "token reward of the guide",
                "reward": "beta log(policy / reference) of the token, in nats",
            },
            {"weights_not_positive": spoilt},
        )

    def weights(self, pairs: Pairs) -> Tensor:
        """f of the token rewards on chosen and on rejected tokens: float32 [2B, T], without gradient."""
        good, bad = halves(required(pairs.scores, "scores").detach())
        weights = torch.cat([self.f_chosen(good), self.f_rejected(bad)])
        if self.min_weight is not None:
            weights = weights.clamp(min=self.min_weight)
        return torch.where(pairs.mask, weights, 0.0)


def guided_optimum(rewards: Tensor, log_ref: Tensor, factor: Tensor, beta: float) -> Tensor:
    """The paper's closed form (Theorem 4.3): the policy over V tokens that maximises
    E[r / (beta f) - log(policy / reference)], which is reference x exp(r / (beta f)), normalised.

    Args:
        rewards, factor: float [..., V], factor above 0; log_ref: float [..., V].

    Returns:
        Log-probabilities, float [..., V].
    """
    return torch.log_softmax(log_ref + rewards / (beta * factor), -1)
