"""Texts that a policy of the preference harness (`reproduce.sentiment`) writes itself, and what they earn.

A text is sampled at temperature 1 and has at most `NEW_TOKENS` tokens.

    written = write(bench, bench.whole(policy), prompts, seed)
    batch = collate_texts(written)                # for the last layers
    measure(bench, policy, prompts, seed)         # reward, divergence, ... by opening
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.align.data import continue_texts, openings
from tokenworks.align.reading import Batch
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.reproduce.sentiment import NEW_TOKENS, PAIRS, SAMPLES, Sentiment

Measured = dict[str, list[float]]
"""By name ("reward", "kl", "distinct", "tokens") one number for each opening."""


class Written(NamedTuple):
    """Ids of an opening and of what was written, and what the frozen layers make of both: float32 [S, d]."""

    prompt: list[int]
    response: list[int]
    trunk: Tensor


def held_out(count: int) -> list[str]:
    """So many of the held-out openings, from all over their list."""
    every = openings("test")
    return every[:: len(every) // count][:count]


def write(bench: Sentiment, writer: Any, prompts: Sequence[str], seed: int) -> list[Written]:
    """A text for each opening by `writer`, a whole model (`bench.whole`) or what generates like one."""
    texts = continue_texts(writer, bench.tokenizer, prompts, NEW_TOKENS, seed, batch=len(prompts))
    begins = [list(bench.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    trunks = bench.trunks([begin + ids for begin, ids in zip(begins, texts, strict=True)])
    return [Written(*each) for each in zip(begins, texts, trunks, strict=True)]


def collate_texts(texts: Sequence[Written]) -> Batch:
    """A batch for the last layers, padded on the right."""
    longest = max(len(text.trunk) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    embeds = torch.zeros(len(texts), longest, texts[0].trunk.shape[1])
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        end = len(text.trunk)
        ids[row, :end] = torch.tensor(text.prompt + text.response)
        attention[row, :end] = 1
        embeds[row, :end] = text.trunk
        mask[row, len(text.prompt) : end] = True
    return Batch(ids, attention, mask[:, 1:], None, embeds)


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of the last layers, from which the response tokens are predicted: float32 [N, d], the rows one by one."""
    found: Tensor = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1][batch.mask]
    return found


def measure(bench: Sentiment, policy: PreTrainedModel, prompts: Sequence[str], seed: int) -> Measured:
    """`judge` of what a policy writes, and "kl", KL(policy || reference) summed over a text."""
    written, found = judge(bench, bench.whole(policy), prompts, seed)
    parts = (written[start : start + PAIRS] for start in range(0, len(written), PAIRS))
    kl = [number for part in parts for number in divergences(bench, policy, part)]
    return found | {"kl": [float(np.mean(kl[place :: len(prompts)])) for place in range(len(prompts))]}


def judge(bench: Sentiment, writer: Any, prompts: Sequence[str], seed: int) -> tuple[list[Written], Measured]:
    """`SAMPLES` texts for each opening, and of these "reward", the mean; "distinct", different pairs of words by
    all; and "tokens", their length."""
    written = write(bench, writer, list(prompts) * SAMPLES, 100 * seed)
    found: Measured = {name: [] for name in ("reward", "distinct", "tokens")}
    for place in range(len(prompts)):
        own = written[place :: len(prompts)]
        texts = [bench.text(each.response) for each in own]
        grams = [pair for text in texts for pair in pairwise(text.split())]
        found["reward"].append(float(np.mean([bench.reward(text) for text in texts])))
        found["distinct"].append(len(set(grams)) / max(1, len(grams)))
        found["tokens"].append(float(np.mean([len(each.response) for each in own])))
    return written, found


@torch.no_grad()
def divergences(bench: Sentiment, policy: PreTrainedModel, texts: Sequence[Written]) -> list[float]:
    """KL(policy || reference) summed over each text."""
    batch = collate_texts(texts)
    reference = Head.of(bench.reference).teacher(states(bench.reference, batch))
    terms = vocabulary_terms(
        Head.of(policy), states(policy, batch), batch.labels[batch.mask], reference, "reverse"
    )
    return [float(part.sum()) for part in terms.divergence.split(batch.mask.sum(1).tolist())]
