"""What RTO rewards in a text, token by token, and who says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.align.rto import dense_rewards, dense_term, gae
from tokenworks.align.scores import token_log_probs
from tokenworks.core.trace import Trace


def rto_trace(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    dpo_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    response: Sequence[int],
    reward: float,
    beta1: float = 0.05,
    beta2: float = 0.01,
    dpo_clip: float | None = 0.05,
) -> Trace:
    """The response with its rewards: the DPO model's, the penalty, the sentence's, and what was to come.

    Args:
        policy: that wrote the text. prompt, response: ids, at least one each; the end of the text included.
        reward: of the whole text, normalised.
        beta1, beta2, dpo_clip: as in `rto.dense_rewards`.

    Raises:
        InputError: an empty prompt or response, a reward that is not finite, or a coefficient below 0.
    """
    log_old, log_ref, log_dpo = (
        token_log_probs(model, prompt, response)[None] for model in (policy, reference, dpo_model)
    )
    mask = torch.ones_like(log_old, dtype=torch.bool)
    rewards = dense_rewards(
        log_dpo, log_ref, log_old, mask, torch.tensor([reward]), beta1, beta2, dpo_clip=dpo_clip
    )
    # Without a critic and with lambda 1 the advantage is what was still to be earned.
    to_come = gae(rewards, torch.zeros_like(rewards), mask, lam=1.0).advantages
    trace = Trace.from_ids(response, tokenizer)
    trace.add("reward", rewards[0].tolist(), "of the token: the next two, and the sentence's at the last token")
    trace.add(
        "token reward", dense_term(log_dpo - log_ref, beta1, dpo_clip)[0].tolist(), "of the DPO model, clamped"
    )
    trace.add("penalty", (-beta2 * (log_old - log_ref))[0].tolist(), "for leaving the reference")
    trace.add("to come", to_come[0].tolist(), "rewards from this token to the end")
    trace.meta |= {"title": f"RTO: {tokenizer.decode(list(prompt))}"[:90], "sentence_reward": reward}
    return trace
