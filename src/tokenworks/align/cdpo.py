"""cDPO: contrastive estimation of critical tokens, and DPO that pushes down mainly those (arXiv 2411.19943).

A wrong chain of thought is often lost at one token. Two copies of the model are tuned, p on right and n on wrong
chains; of a token y the score (contrastive estimation)

    s = softmax((1 + gamma) log p - gamma log n)[y]

is low where wrong chains say what right ones would not. cDPO weighs the tokens of the rejected response by it:

    loss = -log sigmoid(beta sum_t log_ratio_t (chosen) - beta sum_t (1 - s_t) log_ratio_t (rejected))

The last token of a response, its end, has weight 1. Not to be confused with the "conservative" DPO of label
smoothing. How critical tokens are found by rollouts, the definition that the scores stand in for, is in
`align.critical`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tokenworks.align.contract import Needs, Outcome, Pairs, check_positive, halves, required
from tokenworks.core.errors import InputError

REDUCTIONS = ("sequence", "released")


class CDPO:
    """The loss.

    Args:
        beta: above 0.
        only_negative: weigh only the rejected response, as the authors' configuration does; else the chosen tokens
            by s as well.
        reduction: "sequence" is the paper's loss. "released" is that of the authors' code, which takes the sigmoid
            at every position of the padded pair and the mean over all of them, prompt and padding included: it
            depends on how long the data around a pair is, and is here for comparison.

    The data's scores are s_t (see `align.scores.contrastive_scores`).

    Raises:
        InputError: a number out of range, or no such reduction.
    """

    needs = Needs(scores="contrastive scores (align.scores.contrastive_scores)")

    def __init__(self, beta: float = 0.1, only_negative: bool = True, reduction: str = "sequence") -> None:
        check_positive(beta=beta)
        if reduction not in REDUCTIONS:
            raise InputError(f"reduction: no {reduction!r}; there are {', '.join(REDUCTIONS)}")
        self.beta, self.only_negative, self.reduction = beta, only_negative, reduction

    def __call__(self, pairs: Pairs) -> Outcome:
        weights = self.weights(pairs)
        weighted = self.beta * weights * pairs.log_ratio
        if self.reduction == "sequence":
            chosen, rejected = halves(weighted.sum(1))
            loss = -logsigmoid(chosen - rejected)
        else:
            chosen, rejected = halves(weighted)
            loss = -logsigmoid(chosen - rejected).mean(1)
        rewards = self.beta * pairs.log_ratio.detach()
        return Outcome(
            loss,
            rewards.sum(1),
            {"weight": weights, "reward": rewards},
            {
                "weight": "how much the token counts: near 1 on rejected tokens that right chains would not have",
                "reward": "beta log(policy / reference) of the token, in nats",
            },
        )

    def weights(self, pairs: Pairs) -> Tensor:
        """float32 [2B, T], without gradient."""
        scores = required(pairs.scores, "scores").detach()
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            raise InputError("scores: not probabilities; contrastive scores lie in [0, 1]")
        good, bad = halves(scores)
        weights = torch.cat([torch.ones_like(good) if self.only_negative else good, 1 - bad])
        place = torch.arange(pairs.mask.shape[1], device=pairs.mask.device)
        last = torch.where(pairs.mask, place, -1).amax(1, keepdim=True)
        return torch.where(pairs.mask, weights.masked_fill(place == last, 1.0), 0.0)
