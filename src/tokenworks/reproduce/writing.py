"""Texts that a policy of the preference harness (`reproduce.sentiment`) writes itself, and what they earn.

written = write(bench, policy, prompts, seed)
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

from tokenworks.align.data import continue_texts
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


def write(
    bench: Sentiment, policy: PreTrainedModel, prompts: Sequence[str], seed: int, writer: Any = None
) -> list[Written]:
    """A text by `policy` for each opening.

    Args:
        writer: what generates, if not the policy.
    """
    writer = bench.whole(policy) if writer is None else writer
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


def measure(
    bench: Sentiment, policy: PreTrainedModel, prompts: Sequence[str], seed: int, writer: Any = None
) -> Measured:
    """Of `SAMPLES` texts for each opening: mean reward, KL(policy || reference) summed over a text, different
    pairs of words by all, and length. With another `writer` the divergence is still that of `policy`."""
    written = write(bench, policy, list(prompts) * SAMPLES, 100 * seed, writer)
    parts = (written[start : start + PAIRS] for start in range(0, len(written), PAIRS))
    kl = [number for part in parts for number in divergences(bench, policy, part)]
    found: Measured = {name: [] for name in ("reward", "kl", "distinct", "tokens")}
    for place in range(len(prompts)):
        rows = range(place, len(written), len(prompts))
        texts = [bench.text(written[row].response) for row in rows]
        grams = [pair for text in texts for pair in pairwise(text.split())]
        found["reward"].append(float(np.mean([bench.reward(text) for text in texts])))
        found["kl"].append(float(np.mean([kl[row] for row in rows])))
        found["distinct"].append(len(set(grams)) / max(1, len(grams)))
        found["tokens"].append(float(np.mean([len(written[row].response) for row in rows])))
    return found


@torch.no_grad()
def divergences(bench: Sentiment, policy: PreTrainedModel, texts: Sequence[Written]) -> list[float]:
    """KL(policy || reference) summed over each text."""
    batch = collate_texts(texts)
    reference = Head.of(bench.reference).teacher(states(bench.reference, batch))
    terms = vocabulary_terms(
        Head.of(policy), states(policy, batch), batch.labels[batch.mask], reference, "reverse"
    )
    return [float(part.sum()) for part in terms.divergence.split(batch.mask.sum(1).tolist())]
