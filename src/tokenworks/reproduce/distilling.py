"""What AlignDistil's reproduction teaches and measures, on the preference harness (`reproduce.sentiment`)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenworks.align.aligndistil import (
    AlignDistilLogitsProcessor,
    Composed,
    Mode,
    distil_loss,
    distil_trace,
)
from tokenworks.align.data import continue_texts, openings
from tokenworks.align.reading import Batch
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.training import fit
from tokenworks.reproduce.preferring import valences
from tokenworks.reproduce.sentiment import LEARNING_RATE, NEW_TOKENS, PAIRS, SAMPLES, Sentiment

BETA0 = 0.1

EVERY = 3
"""Steps between the points of a learning curve."""

Measured = dict[str, list[float]]
"""By name ("reward", "kl", "distinct", "tokens") one number for each held-out opening."""


@dataclass(frozen=True)
class Setting:
    """A way to teach.

    Attributes:
        shuffled: exchange the alphas of a response's tokens.
        on_policy: on what the policy itself writes.
        sampled: learn from the teacher's word on the written token alone, by REINFORCE, not on the whole
            vocabulary.
        plausible: see `align.aligndistil.compose_teacher`.
    """

    mode: Mode
    strength: float
    shuffled: bool = False
    on_policy: bool = False
    sampled: bool = False
    plausible: float = 0.0


class Study:
    """The models, and how they are taught and measured.

    Args:
        openings_used: held-out openings, of `SAMPLES` continuations each.
        steps: of every training; None is one epoch of distillation, and two of DPO as `Sentiment.dpo` has it.
    """

    def __init__(self, openings_used: int, steps: int | None) -> None:
        self.bench = Sentiment()
        every = openings("test")
        self.prompts = every[:: len(every) // openings_used][:openings_used]
        self.steps = steps or round(len(self.bench.train_pairs) / PAIRS)
        self._epochs = None if steps is None else steps * PAIRS / len(self.bench.train_pairs)

    def dpo(self, seed: int) -> PreTrainedModel:
        return self.bench.dpo(seed, BETA0) if self._epochs is None else self.bench.dpo(seed, BETA0, self._epochs)

    def reverse(self, seed: int) -> PreTrainedModel:
        """One epoch: what is trained to be bad soon only repeats itself."""
        return self.bench.dpo(seed, BETA0, self._epochs or 1, swapped=True)

    def other(self, mode: Mode, seed: int) -> PreTrainedModel:
        return self.reverse(seed) if mode in ("aligndistil", "contrast") else self.bench.reference

    # --- teaching -------------------------------------------------------------------------------------------

    def distil(
        self, setting: Setting, seed: int, watch: Callable[[PreTrainedModel], None] | None = None
    ) -> PreTrainedModel:
        """The last layers, begun as the reference's and taught; `watch` is shown them every `EVERY` steps."""
        policy = copy.deepcopy(self.bench.reference)
        policy.lm_head, policy.model.embed_tokens = (
            self.bench.reference.lm_head,
            self.bench.reference.model.embed_tokens,
        )
        trained = nn.ModuleList([policy.model.layers, policy.model.norm]).requires_grad_(True)
        pairs = self.bench.train_pairs
        order = random.Random(1000 * seed).sample(range(len(pairs)), len(pairs))
        frozen = [self.dpo(seed), self.other(setting.mode, seed)]

        def loss(step: int) -> Tensor:
            if watch is not None and step and step % EVERY == 0:
                watch(policy)
            rows = order[step * PAIRS : (step + 1) * PAIRS] or order[:PAIRS]
            if setting.on_policy:
                written = self._write(policy, [openings("train")[row] for row in rows], 7919 * seed + step)
                batch = self._batch(written)
            else:
                chosen = [(e.pair.prompt, e.pair.chosen, e.trunk[0]) for e in (pairs[row] for row in rows)]
                batch = self._batch(chosen)
            read = [(Head.of(model), states(model, batch)) for model in frozen]
            teacher: Any = Composed(read[0], read[1], setting.mode, setting.strength, BETA0, setting.plausible)
            if setting.shuffled:
                teacher = Shuffled(read[0], read[1], setting.strength, batch.mask, seed * 1000 + step)
            hidden = policy.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1][batch.mask]
            terms = vocabulary_terms(Head.of(policy), hidden, batch.labels[batch.mask], teacher, "reverse")
            # The gradient of the divergence, estimated at the token that was drawn.
            drawn = (terms.log_p - terms.teacher_log_p).detach() * terms.log_p
            divergence, beta = (
                torch.zeros(batch.mask.shape).masked_scatter(batch.mask, values)
                for values in (drawn if setting.sampled else terms.divergence, teacher.beta)
            )
            return distil_loss(divergence, beta, batch.mask)

        fit(trained, loss, self.steps, LEARNING_RATE, warmup=0.1)
        if watch is not None:
            watch(policy)
        return policy.requires_grad_(False)

    def curve(self, setting: Setting, seed: int) -> list[list[float]]:
        """Rewards on the held-out openings after every `EVERY` steps, and at the end."""
        found: list[list[float]] = []
        self.distil(setting, seed, lambda policy: found.append(self.measure(policy, seed)["reward"]))
        return found

    def _write(
        self, policy: PreTrainedModel, prompts: Sequence[str], seed: int
    ) -> list[tuple[list[int], list[int], Tensor]]:
        """Prompt, continuation, and what the trunk makes of both."""
        whole = self.bench.whole(policy)
        texts = continue_texts(whole, self.bench.tokenizer, prompts, NEW_TOKENS, seed, batch=len(prompts))
        begins = [list(self.bench.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        trunks = self.bench.trunks([[*begin, *ids] for begin, ids in zip(begins, texts, strict=True)])
        return list(zip(begins, texts, trunks, strict=True))

    def _batch(self, texts: Sequence[tuple[list[int], list[int], Tensor]]) -> Batch:
        longest = max(len(begin) + len(ids) for begin, ids, _ in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        attention = torch.zeros_like(ids)
        embeds = torch.zeros(len(texts), longest, texts[0][2].shape[1])
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        for row, (begin, response, trunk) in enumerate(texts):
            end = len(begin) + len(response)
            ids[row, :end] = torch.tensor([*begin, *response])
            attention[row, :end] = 1
            embeds[row, :end] = trunk
            mask[row, len(begin) : end] = True
        return Batch(ids, attention, mask[:, 1:], None, embeds)

    # --- measuring ------------------------------------------------------------------------------------------

    def measure(self, policy: PreTrainedModel, seed: int) -> Measured:
        """What the policy writes for the held-out openings."""
        return self._judge(self._write(policy, self.prompts * SAMPLES, 100 * seed), policy)

    def decode(self, seed: int) -> Measured:
        """The same for the teacher itself, written without training; its divergence is not measured."""
        dpo, reverse = (self.bench.whole(model) for model in (self.dpo(seed), self.reverse(seed)))
        pad = self.bench.tokenizer.eos_token_id
        processor = AlignDistilLogitsProcessor(dpo, reverse, "aligndistil", 10, BETA0, pad)
        writer: Any = _Writer(self.bench.model, processor)
        prompts = self.prompts * SAMPLES
        texts = continue_texts(writer, self.bench.tokenizer, prompts, NEW_TOKENS, 100 * seed, batch=len(prompts))
        return self._judge([([], ids, torch.empty(0)) for ids in texts], None)

    def _judge(
        self, written: list[tuple[list[int], list[int], Tensor]], policy: PreTrainedModel | None
    ) -> Measured:
        kl = [float("nan")] * len(written)
        if policy is not None:
            kl = [number for start in range(0, len(written), PAIRS)
                  for number in self._kl(policy, written[start : start + PAIRS])]  # fmt: skip
        found: Measured = {name: [] for name in ("reward", "kl", "distinct", "tokens")}
        for place in range(len(self.prompts)):
            rows = range(place, len(written), len(self.prompts))
            texts = [self.bench.text(written[row][1]) for row in rows]
            grams = [pair for text in texts for pair in pairwise(text.split())]
            found["reward"].append(float(np.mean([self.bench.reward(text) for text in texts])))
            found["kl"].append(float(np.mean([kl[row] for row in rows])) if policy is not None else 0.0)
            found["distinct"].append(len(set(grams)) / max(1, len(grams)))
            found["tokens"].append(float(np.mean([len(written[row][1]) for row in rows])))
        return found

    @torch.no_grad()
    def _kl(self, policy: PreTrainedModel, texts: list[tuple[list[int], list[int], Tensor]]) -> list[float]:
        """KL(policy || reference) summed over each text."""
        batch = self._batch(texts)
        reference = Head.of(self.bench.reference).teacher(states(self.bench.reference, batch))
        terms = vocabulary_terms(
            Head.of(policy), states(policy, batch), batch.labels[batch.mask], reference, "reverse"
        )
        return torch.zeros(batch.mask.shape).masked_scatter(batch.mask, terms.divergence).sum(1).tolist()

    @torch.no_grad()
    def alphas(self, seed: int) -> dict[str, Any]:
        """Of the adaptive teacher on the held-out chosen responses, and whether a token's word has a value."""
        alphas, valued = [], []
        models = (self.dpo(seed), self.reverse(seed))
        for start in range(0, len(self.bench.test_pairs), PAIRS):
            pairs = self.bench.test_pairs[start : start + PAIRS]
            batch = self._batch([(e.pair.prompt, e.pair.chosen, e.trunk[0]) for e in pairs])
            dpo, other = ((Head.of(model), states(model, batch)) for model in models)
            teacher = Composed(dpo, other, "aligndistil", 10, BETA0)
            for place in range(0, len(dpo[1]), 128):
                teacher(slice(place, place + 128))
            alphas += [part.tolist() for part in teacher.alpha.split(batch.mask.sum(1).tolist())]
            valued += [[abs(v) > 1 for v in valences(self.bench, e.pair.chosen)] for e in pairs]
        return {"alphas": alphas, "valued": valued}

    def traces(self) -> list[dict[str, Any]]:
        """The teacher over one chosen response."""
        models = [self.bench.whole(m) for m in (self.bench.reference, self.dpo(0), self.reverse(0))]
        pair = self.bench.test_pairs[0].pair
        decode = self.bench.tokenizer.decode
        trace = distil_trace(
            models[0], models[1], models[2], self.bench.tokenizer, str(decode(pair.prompt)),
            str(decode(pair.chosen, skip_special_tokens=True)), "aligndistil", 10, BETA0,
        )  # fmt: skip
        return [trace.to_dict()]


@torch.no_grad()
def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of the last layers, from which the response tokens are predicted: float32 [N, d]."""
    found: Tensor = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1][batch.mask]
    return found


class Shuffled:
    """The adaptive teacher with its alphas permuted within each response."""

    def __init__(
        self, dpo: tuple[Head, Tensor], other: tuple[Head, Tensor], strength: float, mask: Tensor, seed: int
    ) -> None:
        self._models = (dpo, other)
        plain = Composed(dpo, other, "aligndistil", strength, BETA0)
        for start in range(0, len(dpo[1]), 128):
            plain(slice(start, start + 128))
        generator = torch.Generator().manual_seed(seed)
        parts = plain.alpha.split(mask.sum(1).tolist())
        self.alpha = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])
        self.beta = BETA0 / self.alpha

    @torch.no_grad()
    def __call__(self, part: slice) -> Tensor:
        log_dpo, log_other = (head.log_probs(hidden[part]) for head, hidden in self._models)
        return torch.log_softmax(log_dpo + self.alpha[part, None] * (log_dpo - log_other), -1)


class _Writer:
    """A model that writes with a processor."""

    def __init__(self, model: PreTrainedModel, processor: AlignDistilLogitsProcessor) -> None:
        self.model, self.processor, self.generation_config = model, processor, model.generation_config

    def generate(self, **options: Any) -> Tensor:
        found: Tensor = self.model.generate(**options, logits_processor=[self.processor])  # type: ignore[operator]
        return found
