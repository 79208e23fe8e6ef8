"""Held-out texts of the reference, weighed as another policy would write them.

Sampling anew from every policy costs more than training it. But a policy that was tuned a little writes the texts
of its reference, only more or less often: with y drawn from the reference and w = policy(y) / reference(y), means
under the policy are means of w times the quantity. All policies then share the same texts, so that two of them are
compared without the noise of two samples. What it costs is effective sample size, which is reported.

    texts = HeldOut(bench, 50)              # so many openings
    seen = texts.read(policy)               # JSON data: for each text its weight, divergences, entropy
    texts.difference([seen], [other], "reward")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tokenworks.align.contract import Needs
from tokenworks.align.data import SENTENCE_ENDS, SentimentPair, continue_texts, openings, sentiment_pairs
from tokenworks.align.reading import Batch
from tokenworks.align.vocabulary import Head
from tokenworks.core.files import atomic_write, cache_folder
from tokenworks.core.measure import Indices, Interval, bootstrap_with_seeds
from tokenworks.core.training import Progress, quiet
from tokenworks.reproduce.sentiment import NEW_TOKENS, PAIRS, SAMPLES, Encoded, Sentiment

ROWS = 40
"""Texts that are read at a time."""

Seen = dict[str, list[float]]
"""What a policy makes of the held-out texts and pairs; see `HeldOut.read`."""

Floats = NDArray[np.float64]


class HeldOut:
    """`SAMPLES` texts of the reference for each of the held-out openings, and the held-out pairs.

    Args:
        bench: the harness.
        count: openings to read, the first ones.

    Attributes:
        texts: for each opening and sample the ids up to the end of the first sentence.
        rewards: float64 [openings, samples], of the sentences.
    """

    def __init__(self, bench: Sentiment, count: int, progress: Progress = quiet) -> None:
        self.bench = bench
        self.prompts = openings("test")[:count]
        self.texts = [[self._sentence(ids) for ids in row] for row in self._written(progress)[:count]]
        self.rewards = np.array([[bench.reward(bench.text(ids)) for ids in row] for row in self.texts])

    def _written(self, progress: Progress) -> list[list[list[int]]]:
        """For all openings, whatever the count; kept in the user's cache folder, a round at a time."""
        prompts, rounds = openings("test"), []
        for number in range(SAMPLES):
            key = hashlib.sha256(json.dumps([prompts, NEW_TOKENS, number]).encode()).hexdigest()[:12]
            path = cache_folder() / "sentiment" / f"texts-{key}.json"
            if not path.exists():
                progress(number, SAMPLES, "writing held-out texts")
                made = continue_texts(self.bench.model, self.bench.tokenizer, prompts, NEW_TOKENS, 900 + number)
                with atomic_write(path) as out:
                    json.dump(made, out)
            rounds.append(json.loads(path.read_text()))
        return [list(row) for row in zip(*rounds, strict=True)]

    def _sentence(self, ids: Sequence[int]) -> list[int]:
        """The ids after which it is certain that the first sentence has ended; what follows is not judged."""
        for end in range(1, len(ids)):
            text = str(self.bench.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
            if any(mark in text for mark in SENTENCE_ENDS):
                return list(ids[:end])
        return list(ids)

    @cached_property
    def _batches(self) -> list[Batch]:
        """The texts as rows for the last layers."""
        begins = [list(self.bench.tokenizer(prompt)["input_ids"]) for prompt in self.prompts]
        flat = [(begin, ids) for begin, row in zip(begins, self.texts, strict=True) for ids in row]
        return [self._batch(flat[start : start + ROWS]) for start in range(0, len(flat), ROWS)]

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
        longest = max(len(begin) + len(ids) for begin, ids in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attention, mask = torch.zeros_like(ids), torch.zeros(len(rows), longest, dtype=torch.bool)
        embeds = torch.zeros(len(rows), longest, self.bench.model.config.hidden_size)
        states = self.bench.trunks([begin + text for begin, text in rows])
        for place, (begin, text) in enumerate(rows):
            whole = begin + text
            ids[place, : len(whole)] = torch.tensor(whole)
            attention[place, : len(whole)] = 1
            mask[place, len(begin) : len(whole)] = True
            embeds[place, : len(whole)] = states[place]
        return Batch(ids, attention, mask[:, 1:], None, embeds)

    @torch.inference_mode()
    def read(self, policy: PreTrainedModel) -> Seen:
        """For each text "log_weight", log(policy / reference); "kl" and "reverse_kl", policy to reference and
        back, summed over its tokens; "entropy", of the policy, mean a token. For each held-out pair "chosen_kl"
        and "rejected_kl" (reference to policy, summed), and "margin", the difference of its log-ratios."""
        seen: Seen = {name: [] for name in ("log_weight", "kl", "reverse_kl", "entropy")}
        for batch in self._batches:
            log_p, log_ref = (
                Head.of(top).log_probs(_states(top, batch)[batch.mask]) for top in (policy, self.bench.reference)
            )
            p, ref = log_p.exp(), log_ref.exp()
            labels = batch.labels[batch.mask][:, None]
            counts = batch.mask.sum(1)
            columns = {
                "log_weight": (log_p - log_ref).gather(1, labels)[:, 0],
                "kl": (p * (log_p - log_ref)).sum(-1),
                "reverse_kl": (ref * (log_ref - log_p)).sum(-1),
                "entropy": -(p * log_p).sum(-1),
            }
            for name, values in columns.items():
                sums = torch.stack([part.sum() for part in values.split(counts.tolist())])
                seen[name] += (sums / counts if name == "entropy" else sums).tolist()
        return seen | self._pairs(policy)

    def _pairs(self, policy: PreTrainedModel) -> Seen:
        seen: Seen = {name: [] for name in ("chosen_kl", "rejected_kl", "margin")}
        pairs = self.pairs
        for start in range(0, len(pairs), PAIRS):
            found = self.bench.read(
                policy, self.bench.collate(pairs[start : start + PAIRS]), Needs(divergence=True)
            )
            assert found.divergence is not None
            for name, values in zip(seen, found.divergence.sum(1).chunk(2), strict=False):
                seen[name] += values.tolist()
            chosen, rejected = found.log_ratio.sum(1).chunk(2)
            seen["margin"] += (chosen - rejected).tolist()
        return seen

    @cached_property
    def pairs(self) -> list[Encoded]:
        """The held-out pairs of the openings, encoded."""
        return self.bench.encode_all(self._test_pairs)

    # --- what it means --------------------------------------------------------------------------------------

    def mean(self, seen: Sequence[Seen], name: str, items: Indices | None = None) -> float:
        """Of a quantity under the policy, over texts and over seeds; of pairs' quantities, over pairs.

        Args:
            seen: of each seed.
            name: "reward", "accuracy", "gap" (|D_w - D_l|), or a column of `read`.
            items: openings to take; by default each once. Pairs are those of the same openings.
        """
        chosen = np.arange(len(self.prompts)) if items is None else items
        if name in ("accuracy", "gap", "margin", "chosen_kl", "rejected_kl"):
            places = self._pair_of[chosen]
            kept = places[places >= 0]
            return float(np.mean([self._of_pairs(each, name)[kept].mean() for each in seen]))
        found = []
        for each in seen:
            weights = self.weights(each)[chosen]
            values = self.rewards if name == "reward" else self._rows(each, name)
            found.append((weights * values[chosen]).sum() / weights.sum())
        return float(np.mean(found))

    def interval(self, seen: Sequence[Seen], name: str) -> Interval:
        """Of `mean`, resampling openings."""
        return self.over(lambda items, rows: self.mean([seen[row] for row in rows], name, items), len(seen))

    def difference(self, ours: Sequence[Seen], theirs: Sequence[Seen], name: str) -> Interval:
        """Of `mean`, ours less theirs of the same seeds, resampling openings and seeds together."""
        return self.over(
            lambda items, rows: (
                self.mean([ours[row] for row in rows], name, items)
                - self.mean([theirs[row] for row in rows], name, items)
            ),
            len(ours),
        )

    def over(self, statistic: Callable[[Indices, Indices], float], seeds: int) -> Interval:
        """Bootstrap over openings and, in the same resample, over seeds."""
        return bootstrap_with_seeds(statistic, len(self.prompts), seeds, draws=1000)

    def win_rate(self, ours: Sequence[Seen], theirs: Sequence[Seen]) -> Interval:
        """How often our text has a higher reward than theirs to the same opening; ties count half."""
        higher = self.rewards[:, :, None] > self.rewards[:, None, :]
        wins = higher + 0.5 * (self.rewards[:, :, None] == self.rewards[:, None, :])
        # One text cannot stand for two independent ones.
        others = ~np.eye(self.rewards.shape[1], dtype=bool)

        def rate(items: Indices, rows: Indices) -> float:
            found = []
            for row in rows:
                one, other = self.weights(ours[row])[items], self.weights(theirs[row])[items]
                both = one[:, :, None] * other[:, None, :] * others
                found.append((both * wins[items]).sum() / both.sum())
            return float(np.mean(found))

        return self.over(rate, len(ours))

    def effective(self, seen: Seen) -> float:
        """Effective number of texts: (sum w)^2 / sum w^2."""
        weights = self.weights(seen)
        return float(weights.sum() ** 2 / (weights**2).sum())

    def weights(self, seen: Seen) -> Floats:
        """policy / reference of every text: float64 [openings, samples]."""
        return np.exp(self._rows(seen, "log_weight"))

    def _rows(self, seen: Seen, name: str) -> Floats:
        return np.array(seen[name]).reshape(self.rewards.shape)

    @cached_property
    def _test_pairs(self) -> list[SentimentPair]:
        return [pair for pair in sentiment_pairs("test") if pair.prompt in set(self.prompts)]

    @cached_property
    def _pair_of(self) -> Indices:
        """For each opening the number of its held-out pair, -1 if it has none."""
        places = {pair.prompt: number for number, pair in enumerate(self._test_pairs)}
        return np.array([places.get(prompt, -1) for prompt in self.prompts])

    @staticmethod
    def _of_pairs(seen: Seen, name: str) -> Floats:
        if name == "accuracy":
            return (np.array(seen["margin"]) > 0).astype(float)
        if name == "gap":
            return np.abs(np.array(seen["chosen_kl"]) - np.array(seen["rejected_kl"]))
        return np.array(seen[name])


def _states(top: Any, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = top.model(
        inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state[:, :-1]
    return found
