"""DPO (arXiv 2305.18290) in the contract: the baseline of the family, and TRL's `loss_type="sigmoid"` exactly."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from tokenworks.align.contract import Needs, Outcome, Pairs, check_positive, halves


class DPO:
    """-log sigmoid(beta (m_w - m_l)), with m the sum of log-ratios over a response.

    Args:
        beta: above 0; how dear it is to leave the reference.
    """

    needs = Needs()

    def __init__(self, beta: float = 0.1) -> None:
        check_positive(beta=beta)
        self.beta = beta

    def __call__(self, pairs: Pairs) -> Outcome:
        rewards = self.beta * pairs.log_ratio
        chosen, rejected = halves(rewards.sum(1))
        return Outcome(
            -logsigmoid(chosen - rejected),
            rewards.sum(1).detach(),
            {"reward": rewards.detach()},
            {"reward": "beta log(policy / reference) of the token, in nats"},
        )
