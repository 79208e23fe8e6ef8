"""Per-token scores of the data, computed once by models other than the policy.

    scorer = guide_rewards(guide, reference, beta=0.1)        # for TGDPO
    scorer = contrastive_scores(right, wrong, gamma=1.0)      # for cDPO
    TokenPreferenceTrainer(model, method=TGDPO(), scorer=scorer, ...)

A scorer takes the ids of a prompt and of a response, and gives one number for each token of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.align.contract import check_not_negative
from tokenworks.align.reading import check_same_vocabulary
from tokenworks.align.vocabulary import CHUNK, Head, check_head, vocabulary_terms
from tokenworks.core.errors import InputError

Scorer = Callable[[Sequence[int], Sequence[int]], list[float]]


def guide_rewards(guide: PreTrainedModel, reference: PreTrainedModel, beta: float = 0.1) -> Scorer:
    """beta log(guide / reference) of every token: the reward that DPO's implicit form gives it.

    Raises:
        InputError: the models' vocabularies differ.
    """
    _check(guide, reference)

    def score(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        ours, theirs = (token_log_probs(model, prompt, response) for model in (guide, reference))
        return (beta * (ours - theirs)).tolist()

    return score


def contrastive_scores(right: PreTrainedModel, wrong: PreTrainedModel, gamma: float = 1.0) -> Scorer:
    """softmax((1 + gamma) log p - gamma log n) of every token, with p the model of right texts and n of wrong
    ones.

    Args:
        gamma: from 0 upwards; 0 leaves p.

    Raises:
        InputError: the models' vocabularies differ, or gamma is negative.
    """
    _check(right, wrong)
    check_not_negative(gamma=gamma)

    @torch.inference_mode()
    def score(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        states = [response_states(model, prompt, response) for model in (right, wrong)]
        found: list[Tensor] = []
        for start in range(0, len(response), CHUNK):
            part = slice(start, start + CHUNK)
            log_p, log_n = (
                Head.of(model).log_probs(own[part]) for model, own in zip((right, wrong), states, strict=True)
            )
            labels = torch.tensor(response[part], device=log_p.device)
            found.append(contrast(log_p, log_n, gamma).gather(1, labels[:, None])[:, 0])
        return torch.cat(found).exp().clamp(max=1).tolist()  # rounding may leave a little more

    return score


def _check(one: PreTrainedModel, other: PreTrainedModel) -> None:
    check_same_vocabulary(one, other)
    for model in (one, other):
        check_head(model)


def contrast(log_p: Tensor, log_n: Tensor, gamma: float) -> Tensor:
    """log softmax((1 + gamma) log p - gamma log n): float [..., V]. Constants added to either change nothing."""
    return torch.log_softmax((1 + gamma) * log_p - gamma * log_n, -1)


@torch.inference_mode()
def response_states(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """The states from which each token of the response is predicted: float [n, d].

    Raises:
        InputError: an empty prompt or response.
    """
    if not prompt or not response:
        raise InputError("prompt, response: empty; both need at least one token")
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    states: Tensor = found[0, len(prompt) - 1 : -1]
    return states


@torch.inference_mode()
def token_log_probs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Of every token of the response: float32 [n]."""
    states = response_states(model, prompt, response)
    return vocabulary_terms(Head.of(model), states, torch.tensor(response, device=states.device)).log_p
