"""What AlignDistil's reproduction teaches and measures, on the preference harness (`reproduce.sentiment`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.align.aligndistil import (
    AlignDistilLogitsProcessor,
    Composed,
    Mode,
    distil_loss,
    distil_trace,
)
from tokenworks.align.data import openings
from tokenworks.align.vocabulary import CHUNK, Head, vocabulary_terms
from tokenworks.core.training import fit
from tokenworks.reproduce.preferring import valences
from tokenworks.reproduce.sentiment import LEARNING_RATE, PAIRS, Encoded, Sentiment
from tokenworks.reproduce.writing import Measured, Written, collate_texts, held_out, judge, measure, states, write

BETA0 = 0.1

EVERY = 3
"""Steps between the points of a learning curve."""


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
        self.prompts = held_out(openings_used)
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
        policy, trained = self.bench.begin()
        pairs = self.bench.train_pairs
        order = random.Random(1000 * seed).sample(range(len(pairs)), len(pairs))
        frozen = [self.dpo(seed), self.other(setting.mode, seed)]

        def loss(step: int) -> Tensor:
            if watch is not None and step and step % EVERY == 0:
                watch(policy)
            rows = order[step * PAIRS : (step + 1) * PAIRS] or order[:PAIRS]
            if setting.on_policy:
                prompts = [openings("train")[row] for row in rows]
                batch = collate_texts(write(self.bench, self.bench.whole(policy), prompts, 7919 * seed + step))
            else:
                batch = collate_texts([_chosen(pairs[row]) for row in rows])
            with torch.no_grad():
                read = [(Head.of(model), states(model, batch)) for model in frozen]
            teacher: Any = Composed(read[0], read[1], setting.mode, setting.strength, BETA0, setting.plausible)
            if setting.shuffled:
                teacher = Shuffled(read[0], read[1], setting.strength, batch.mask, seed * 1000 + step)
            labels = batch.labels[batch.mask]
            terms = vocabulary_terms(Head.of(policy), states(policy, batch), labels, teacher, "reverse")
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

    # --- measuring ------------------------------------------------------------------------------------------

    def measure(self, policy: PreTrainedModel, seed: int) -> Measured:
        """What the policy writes for the held-out openings."""
        return measure(self.bench, policy, self.prompts, seed)

    def decode(self, seed: int) -> Measured:
        """The same for the teacher itself, written without training; its divergence is not measured."""
        dpo, reverse = (self.bench.whole(model) for model in (self.dpo(seed), self.reverse(seed)))
        pad = self.bench.tokenizer.eos_token_id
        processor = AlignDistilLogitsProcessor(dpo, reverse, "aligndistil", 10, BETA0, pad)
        writer = _Writer(self.bench.model, processor)
        return judge(self.bench, writer, self.prompts, seed)[1]

    @torch.no_grad()
    def alphas(self, seed: int) -> dict[str, Any]:
        """Of the adaptive teacher on the held-out chosen responses, and whether a token's word has a value."""
        alphas, valued = [], []
        models = (self.dpo(seed), self.reverse(seed))
        for start in range(0, len(self.bench.test_pairs), PAIRS):
            pairs = self.bench.test_pairs[start : start + PAIRS]
            batch = collate_texts([_chosen(each) for each in pairs])
            dpo, other = ((Head.of(model), states(model, batch)) for model in models)
            alphas += [part.tolist() for part in strengths(dpo, other, 10).split(batch.mask.sum(1).tolist())]
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


def strengths(dpo: tuple[Head, Tensor], other: tuple[Head, Tensor], strength: float) -> Tensor:
    """alpha [N] of the adaptive teacher at all of N tokens."""
    teacher = Composed(dpo, other, "aligndistil", strength, BETA0)
    for start in range(0, len(dpo[1]), CHUNK):
        teacher(slice(start, start + CHUNK))
    return teacher.alpha


def _chosen(pair: Encoded) -> Written:
    return Written(pair.pair.prompt, pair.pair.chosen, pair.trunk[0])


class Shuffled:
    """The adaptive teacher with its alphas permuted within each response."""

    def __init__(
        self, dpo: tuple[Head, Tensor], other: tuple[Head, Tensor], strength: float, mask: Tensor, seed: int
    ) -> None:
        self._models = (dpo, other)
        generator = torch.Generator().manual_seed(seed)
        parts = strengths(dpo, other, strength).split(mask.sum(1).tolist())
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
