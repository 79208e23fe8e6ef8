"""RTO (arXiv 2404.18922): PPO whose rewards stand at every token, where a DPO model puts them.

A sentence's reward says whether a text was good and not which token made it so. DPO's log-ratio does, up to terms
that cancel along a text: beta log pi*/pi_ref = r + V*(next state) - V*(state). With response tokens a_h, the last
one H, and the policy that wrote the text as it then was:

    r_h = clamp(beta1 log(dpo / ref)(a_h)) - beta2 log(written / ref)(a_h) + 1[h = H] beta3 r(x, y)

Then generalised advantage estimation, and PPO's two clipped losses. With beta1 = 0 this is PPO as RLHF has it.
Without the clamp the first term sums to beta1 log dpo(y)/ref(y), and shaping changes no optimum; with it, the sum
and that guarantee are lost. Trained on the first two terms alone, the policy becomes proportional to
ref^(1 - beta1/beta2) dpo^(beta1/beta2): too large a beta1 merely finds the DPO model again.

Everything here is arithmetic on [B, T] tensors; `rto_trainer` has the models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenworks.align.contract import check_not_negative
from tokenworks.core.errors import InputError


def dense_term(log_ratio: Tensor, beta1: float, clip: float | None) -> Tensor:
    """clamp(beta1 log(dpo / ref), -clip, clip): the clamp acts after scaling; None leaves it out."""
    scaled = beta1 * log_ratio
    return scaled if clip is None else scaled.clamp(-clip, clip)


def dense_rewards(
    log_dpo: Tensor,
    log_ref: Tensor,
    log_old: Tensor,
    mask: Tensor,
    sentence: Tensor,
    beta1: float = 0.05,
    beta2: float = 0.01,
    beta3: float = 1.0,
    dpo_clip: float | None = 0.05,
    reward_clip: float = 10.0,
) -> Tensor:
    """A reward for every token.

    Args:
        log_dpo, log_ref, log_old: float [B, T], of each token under the DPO model, the reference, and the policy
            that wrote it, all at the temperature of sampling.
        mask: bool [B, T], the response tokens, the end of the text included.
        sentence: float [B], normalised rewards of the texts.
        dpo_clip: largest size of the first term; None for none.

    Returns:
        float [B, T], zero outside the responses. The sentence's reward is at the last token that was written,
        whether or not it ends the text.

    Raises:
        InputError: shapes that differ, rewards that are not finite, or a coefficient below 0.
    """
    check_not_negative(beta1=beta1, beta2=beta2, beta3=beta3, reward_clip=reward_clip, dpo_clip=dpo_clip or 0.0)
    check_sentence_rewards(sentence, len(mask))
    for name, values in (("log_dpo", log_dpo), ("log_ref", log_ref), ("log_old", log_old)):
        if values.shape != mask.shape:
            raise InputError(f"{name}: shape {list(values.shape)}, and mask has {list(mask.shape)}")
    found = dense_term(log_dpo - log_ref, beta1, dpo_clip) - beta2 * (log_old - log_ref)
    found = torch.where(mask, found, 0.0)
    rows = mask.any(1).nonzero()[:, 0]
    found[rows, last_index(mask)[rows]] += beta3 * sentence[rows].clamp(-reward_clip, reward_clip)
    return found


def last_index(mask: Tensor) -> Tensor:
    """Of the last token of each row: int64 [B]; 0 in a row without tokens."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)


def check_sentence_rewards(rewards: Tensor, texts: int) -> None:
    """Raise `InputError` unless there is one finite number for each text."""
    if rewards.shape != (texts,):
        raise InputError(f"rewards: shape {list(rewards.shape)} for {texts} texts; give one number for each")
    if not torch.isfinite(rewards).all():
        place = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        raise InputError(
            f"rewards: that of text {place} is {float(rewards[place])}; every text needs a finite one"
        )


class Advantages(NamedTuple):
    """float [B, T] each, zero outside the mask: advantages, and the returns that values are fitted to."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """Generalised advantage estimation (arXiv 1506.02438): A_t = delta_t + gamma lam A_(t+1), with
    delta_t = r_t + gamma V_(t+1) - V_t and V = 0 after the last token.

    Args:
        rewards, values: float [B, T]; mask: bool [B, T], each row some tokens and then only padding.
        gamma, lam: in [0, 1].

    Raises:
        InputError: a number out of range.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise InputError(f"{name}: {number} is not in [0, 1]")
    values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    delta = rewards + gamma * following - values
    found = torch.zeros_like(values)
    later = values.new_zeros(len(values))
    for place in reversed(range(values.shape[1])):
        later = torch.where(mask[:, place], delta[:, place] + gamma * lam * later, 0.0)
        found[:, place] = later
    return Advantages(found, torch.where(mask, found + values, 0.0))


def whiten(values: Tensor, mask: Tensor, totals: Tensor | None = None) -> Tensor:
    """(values - mean) / std over the tokens of the whole buffer; zero outside the mask.

    Args:
        totals: float64 [3], number, sum and sum of squares over all processes; None if there is but this one.
    """
    number, total, squares = token_totals(values, mask) if totals is None else totals
    mean = total / number.clamp(min=1)
    std = (squares / number.clamp(min=1) - mean**2).clamp(min=0).sqrt()
    return torch.where(mask, (values - mean.to(values)) / (std.to(values) + 1e-8), 0.0)


def token_totals(values: Tensor, mask: Tensor) -> Tensor:
    """Number, sum and sum of squares of the tokens in the mask: float64 [3]."""
    kept = values[mask].double()
    return torch.stack([kept.new_tensor(len(kept)), kept.sum(), (kept**2).sum()])


def policy_loss(log_p: Tensor, log_old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """PPO's clipped loss: the mean over each text, then over texts. float [B, T] in, a scalar out.

    TRL's loss_type "grpo" with advantages by token, which is what the trainer uses, is the same number.
    """
    check_not_negative(clip=clip)
    ratio = (log_p - log_old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -text_mean(gain, mask)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Half the larger of the two squared errors, that of the value and that of the value kept near its old one."""
    check_not_negative(clip=clip)
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * text_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def text_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over each text's tokens, then over texts."""
    return (torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()
