"""PPO with token rewards, as RTO's two experiments run it: one round, and how fast a run of them learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenworks.align.critic import Critic
from tokenworks.align.rto import dense_rewards, gae, policy_loss, value_loss, whiten
from tokenworks.core.measure import mean_interval
from tokenworks.reproduce.result import line

BETA1, CLIP, BETA2 = 0.05, 0.05, 0.01
"""The authors' scale of the DPO model's log-ratios, their clamp, and the penalty."""

TEXTS = 32
"""Written in a round, before one pass over them in two minibatches."""

SMOOTH = 5
"""Rounds whose mean reward stands for what a policy earns."""


@dataclass(frozen=True)
class Round:
    """Texts and what the models say of them.

    Attributes:
        mask: bool [B, T]; each row some tokens and then padding.
        sentence: float [B], the texts' rewards, normalised.
        log_old, log_ref: float [B, T], of the actor that wrote them and of the reference.
        ratio: float [B, T], log of the DPO model by the reference; 0 is PPO.
        states: float [B, T, d] of the reference, for the critic.
    """

    mask: Tensor
    sentence: Tensor
    log_old: Tensor
    log_ref: Tensor
    ratio: Tensor
    states: Tensor


class Learner:
    """An actor's weights and a critic, with their optimisers.

    Args:
        actor: the parameters to train.
        width: of the states.
        rates: learning rates of actor and critic.
    """

    def __init__(self, actor: Iterable[nn.Parameter], width: int, rates: tuple[float, float]) -> None:
        self.critic = Critic(width)
        self._groups = [list(actor), list(self.critic.parameters())]
        self._optimizers = [
            torch.optim.AdamW(group, rate, betas=(0.9, 0.95), weight_decay=0.0)
            for group, rate in zip(self._groups, rates, strict=True)
        ]

    def learn(self, round_: Round, read: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
        """One pass over the texts, in two minibatches.

        Args:
            read: the actor's log-probabilities [n, T], with gradient, of the texts with these numbers [n].
        """
        mask, old, states = round_.mask, round_.log_old, round_.states
        with torch.no_grad():
            old_values = torch.where(mask, self.critic(states), 0.0)
        rewards = dense_rewards(
            round_.log_ref + round_.ratio, round_.log_ref, old, mask, round_.sentence, BETA1, BETA2, dpo_clip=CLIP
        )
        advantages, returns = gae(rewards, old_values, mask)
        advantages = whiten(advantages, mask)
        for part in torch.randperm(len(mask), generator=generator).chunk(2):
            loss = policy_loss(read(part), old[part], advantages[part], mask[part])
            loss = loss + value_loss(self.critic(states[part]), old_values[part], returns[part], mask[part])
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in self._groups:
                torch.nn.utils.clip_grad_norm_(group, 1.0)
            for optimizer in self._optimizers:
                optimizer.step()


# --- what was earned ------------------------------------------------------------------------------------------


def smoothed(rewards: Sequence[float]) -> NDArray[np.float64]:
    """The mean over `SMOOTH` rounds that end at each."""
    return np.convolve(rewards, np.ones(SMOOTH) / SMOOTH, "valid")


def texts_needed(rewards: Sequence[float], level: float) -> float:
    """How many texts were written when `level` was first earned; twice all of them if it never was, since to count
    it as reached at the end would let no way be slower than PPO."""
    above = np.flatnonzero(smoothed(rewards) >= level)
    return float((above[0] + SMOOTH if len(above) else 2 * len(rewards)) * TEXTS)


def needed_for_ppo(found: Mapping[str, Sequence[dict[str, Any]]], way: str) -> NDArray[np.float64]:
    """Of each seed, how many texts a way needed to earn what PPO earned in the end."""
    levels = [float(smoothed(each["rewards"])[-1]) for each in found["PPO"]]
    return np.array([texts_needed(e["rewards"], level) for e, level in zip(found[way], levels, strict=True)])


def curve(found: Mapping[str, Sequence[dict[str, Any]]], title: str, unit: str) -> dict[str, Any]:
    """A plot of "rewards" by texts written, each way's mean over seeds."""
    lines = []
    for way, runs in found.items():
        rewards = np.array([smoothed(each["rewards"]) for each in runs])
        texts = TEXTS * (2 if "twice" in way else 1)
        places = range(0, rewards.shape[1], max(1, rewards.shape[1] // 20))
        lines.append(
            line(way, [(p + SMOOTH) * texts for p in places], [mean_interval(rewards[:, p]) for p in places])
        )
    return {"title": title, "x_label": "texts written", "y_label": unit, "lines": lines}
