"""The algorithm that RTO's theory is about, for rewards that are linear in features of a token.

    reward = PessimisticTokenReward(caution=1.0).fit(chosen, rejected)    # features summed over each text
    reward(features)                                                     # of single tokens
    policy = soft_value_iteration(rewards, log_ref, beta)                # on a tree of all texts

Which of two texts is preferred follows from the difference of their summed token rewards (Bradley and Terry), and
the rewards' parameters are found by maximum likelihood. What the data leaves open is then held against a token:
its reward is lowered by as much as it is uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor

from tokenworks.align.contract import check_not_negative, check_positive
from tokenworks.core.errors import InputError

Floats = NDArray[np.float64]


class PessimisticTokenReward:
    """features . theta - caution |features - nu|, in the norm of the inverse of sum x x' + ridge I.

    Args:
        caution: from 0 upwards; rho of the paper. 0 is the maximum-likelihood reward.
        bound: above 0, the largest norm of theta.
        ridge: above 0, lambda of the paper.
        nu: float [d], features of which nothing is held uncertain; zero if None.

    Attributes:
        theta: float64 [d], once fitted.
        covariance: float64 [d, d], once fitted.
    """

    theta: Floats
    covariance: Floats

    def __init__(
        self, caution: float = 1.0, bound: float = 100.0, ridge: float = 1.0, nu: ArrayLike | None = None
    ) -> None:
        check_not_negative(caution=caution)
        check_positive(bound=bound, ridge=ridge)
        self.caution, self.bound, self.ridge, self.nu = caution, bound, ridge, nu

    def fit(self, chosen: ArrayLike, rejected: ArrayLike) -> PessimisticTokenReward:
        """Find theta; what no pair tells apart stays 0.

        Args:
            chosen, rejected: float [n, d], features of the tokens summed over the texts of each pair.

        Raises:
            InputError: shapes that differ, no pairs, or numbers that are not finite.
        """
        one, two = (np.asarray(values, np.float64) for values in (chosen, rejected))
        if one.ndim != 2 or one.shape != two.shape or not len(one):
            raise InputError(
                f"rejected: shape {two.shape}, chosen has {one.shape}; both must be [n, d] with n above 0"
            )
        x = one - two
        if not np.isfinite(x).all():
            raise InputError("chosen, rejected: not all features are finite")

        def loss(theta: Floats) -> tuple[float, Floats]:
            margin = x @ theta
            return float(-log_expit(margin).mean()), -(expit(-margin) @ x) / len(x)

        start = np.zeros(x.shape[1])
        self.theta = minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "maxiter": 5000}).x
        if np.linalg.norm(self.theta) > self.bound:  # the ball is seldom reached; then it takes a slower method
            inside: dict[str, Any] = {
                "type": "ineq", "fun": lambda t: self.bound**2 - t @ t, "jac": lambda t: -2 * t
            }  # fmt: skip
            start = self.theta * (self.bound / np.linalg.norm(self.theta))
            self.theta = minimize(loss, start, jac=True, method="SLSQP", constraints=[inside]).x
        self.covariance = x.T @ x + self.ridge * np.eye(x.shape[1])
        return self

    def __call__(self, features: ArrayLike) -> Floats:
        """Rewards float64 [...] of features [..., d].

        Raises:
            InputError: not fitted, or features of another width.
        """
        if not hasattr(self, "theta"):
            raise InputError("reward: it is not fitted yet; call fit first")
        phi = np.asarray(features, np.float64)
        if phi.shape[-1:] != self.theta.shape:
            raise InputError(
                f"features: shape {phi.shape}, and the reward was fitted on {len(self.theta)} of them"
            )
        away = phi if self.nu is None else phi - np.asarray(self.nu, np.float64)
        solved = np.linalg.solve(self.covariance, away.reshape(-1, len(self.theta)).T).T.reshape(away.shape)
        found: Floats = phi @ self.theta - self.caution * np.sqrt((away * solved).sum(-1))
        return found


def soft_value_iteration(
    rewards: Sequence[Tensor], log_ref: Sequence[Tensor], beta: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The policy that maximises E[sum of rewards] - beta KL(policy || reference) over texts of fixed length.

    Args:
        rewards, log_ref: for each place t float [V^t, V]: a row for every text so far, in the order in which its
            last token counts fastest.
        beta: above 0.

    Returns:
        log-probabilities of the policy, shaped alike, and the values [V^t] before each token.
    """
    check_positive(beta=beta)
    policy: list[Tensor] = []
    values: list[Tensor] = []
    after: Tensor | None = None
    for reward, log in zip(reversed(rewards), reversed(log_ref), strict=True):
        q = reward if after is None else reward + after.view_as(reward)
        tilted = log + q / beta
        after = beta * torch.logsumexp(tilted, 1)
        policy.insert(0, tilted.log_softmax(1))
        values.insert(0, after)
    return policy, values
