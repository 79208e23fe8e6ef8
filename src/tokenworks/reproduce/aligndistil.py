"""AlignDistil (arXiv 2503.02832): does a teacher made by token of two DPO models teach more than either alone?

The paper has it ahead of DPO and other losses on AlpacaEval 2, MT-Bench and Arena-Hard. Here SmolLM2's last layers
learn to write gladder continuations (see `reproduce.sentiment`): from the chosen responses, as the authors' second
setting has it, by teachers of every mode, with DPO at two strengths beside them and one short run on the policy's
own texts. Two controls decide what the adaptive strength is worth: the same strength everywhere, read off at the
same distance from the reference, and the same strengths shuffled within each response.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
from tokenworks.core.measure import Interval, bootstrap, mean_interval
from tokenworks.core.training import fit
from tokenworks.reproduce import Run
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, figure
from tokenworks.reproduce.sentiment import LEARNING_RATE, MODEL, NEW_TOKENS, PAIRS, SAMPLES, Sentiment

BETA0 = 0.1
ADAPTIVE = "adaptive c=10"
"""The authors' setting for given responses, and the one that is judged."""

Floats = NDArray[np.float64]
Measured = dict[str, list[float]]
"""By name ("reward", "kl", "distinct", "tokens") one number for each held-out opening."""


@dataclass(frozen=True)
class Setting:
    """A way to teach."""

    mode: Mode
    strength: float
    shuffled: bool = False
    on_policy: bool = False


JUDGED = {
    ADAPTIVE: Setting("aligndistil", 10),
    "shuffled c=10": Setting("aligndistil", 10, shuffled=True),
    "contrast k=1": Setting("contrast", 1),
    "contrast k=4": Setting("contrast", 4),
}
"""For every seed."""

OTHERS = {
    "adaptive c=2": Setting("aligndistil", 2),
    "adaptive c=15": Setting("aligndistil", 15),
    "theorem1 k=1": Setting("theorem1", 1),
    "theorem1 k=4": Setting("theorem1", 4),
    "on-policy c=15": Setting("aligndistil", 15, on_policy=True),
}
"""For the first seed alone."""


def run(settings: Run) -> Result:
    """Measure, in about fifteen minutes a seed on one CPU core; `quick` takes three minutes."""
    begun = time.perf_counter()
    seeds = 1 if settings.quick else settings.seeds
    study = Study(4 if settings.quick else 25, 2 if settings.quick else None)
    facts = {"openings": len(study.prompts), "samples": SAMPLES, "steps": study.steps, "beta0": BETA0}
    ledger = Ledger(settings.folder / "unfinished" / "aligndistil", {**facts, "torch": torch.__version__})
    found: dict[str, list[Measured]] = {}
    pieces = [piece for seed in range(seeds) for piece in _judged(study, seed)]
    if not settings.quick:
        pieces += _others(study)
    for number, (name, seed, work) in enumerate(pieces):
        settings.progress(number, len(pieces), f"{name}, seed {seed}")
        found.setdefault(name, []).append(ledger.once(f"{name} {seed}", work))
    result = Result(
        slug="aligndistil",
        claim="",
        figures=_figures(found),
        seeds=list(range(seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={**facts, "pairs_a_step": PAIRS, "learning_rate": LEARNING_RATE, "new_tokens": NEW_TOKENS},
        table=[_row(name, rows) for name, rows in found.items()],
        series=[_frontier(found)],
        traces=ledger.once("traces", study.traces),
        notes=[
            "A seed varies the order of the data in DPO, reverse DPO and distillation, and what is sampled.",
            "The authors train for an epoch of 64,000 prompts and judge with large models; here it is an epoch of "
            "287 pairs and a lexicon. How soon 90% of DPO's gain is reached was not measured: it needs an "
            "evaluation every few steps.",
            "Settings with one seed in the table are there to be looked at, and are not judged.",
        ],
    )
    ledger.close()
    return result


Piece = tuple[str, int, Callable[[], Measured]]


def _judged(study: Study, seed: int) -> list[Piece]:
    """What the verdict rests on, for one seed."""
    return [
        ("reference", seed, lambda: study.measure(study.bench.reference, seed)),
        ("DPO beta=0.1", seed, lambda: study.measure(study.dpo(seed), seed)),
        *_taught(study, JUDGED, seed),
    ]


def _others(study: Study) -> list[Piece]:
    """What is there to be looked at, for the first seed."""
    return [
        ("DPO beta=0.01", 0, lambda: study.measure(study.bench.dpo(0, 0.01), 0)),
        *_taught(study, OTHERS, 0),
        ("teacher itself c=10", 0, lambda: study.decode(0)),
    ]


def _taught(study: Study, ways: dict[str, Setting], seed: int) -> list[Piece]:
    def work(setting: Setting) -> Callable[[], Measured]:
        return lambda: study.measure(study.distil(setting, seed), seed)

    return [(name, seed, work(setting)) for name, setting in ways.items()]


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

    def distil(self, setting: Setting, seed: int) -> PreTrainedModel:
        """The last layers, begun as the reference's and taught."""
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
            rows = order[step * PAIRS : (step + 1) * PAIRS] or order[:PAIRS]
            if setting.on_policy:
                written = self._write(policy, [openings("train")[row] for row in rows], 7919 * seed + step)
                batch = self._batch(written)
            else:
                chosen = [(e.pair.prompt, e.pair.chosen, e.trunk[0]) for e in (pairs[row] for row in rows)]
                batch = self._batch(chosen)
            read = [(Head.of(model), states(model, batch)) for model in frozen]
            teacher: Any = Composed(read[0], read[1], setting.mode, setting.strength, BETA0)
            if setting.shuffled:
                teacher = Shuffled(read[0], read[1], setting.strength, batch.mask, seed * 1000 + step)
            hidden = policy.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1][batch.mask]
            terms = vocabulary_terms(Head.of(policy), hidden, batch.labels[batch.mask], teacher, "reverse")
            divergence, beta = (
                torch.zeros(batch.mask.shape).masked_scatter(batch.mask, values)
                for values in (terms.divergence, teacher.beta)
            )
            return distil_loss(divergence, beta, batch.mask)

        fit(trained, loss, self.steps, LEARNING_RATE, warmup=0.1)
        return policy.requires_grad_(False)

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


# --- the Result ---------------------------------------------------------------------------------------------


def _by_opening(rows: Sequence[Measured], name: str) -> Floats:
    """The mean over seeds, for each opening."""
    return np.mean([row[name] for row in rows], 0)


def _figures(found: dict[str, list[Measured]]) -> list[Figure]:
    ours = _by_opening(found[ADAPTIVE], "reward")

    def against(name: str, headline: bool) -> Figure:
        rows = found[name]
        mine = _by_opening(found[ADAPTIVE][: len(rows)], "reward")
        theirs = _by_opening(rows, "reward")
        return figure(
            f"Reward of {ADAPTIVE} minus that of {name}", "VADER compound", mean_interval(mine - theirs), 0.0, 0.0,
            ours=float(mine.mean()), baseline=float(theirs.mean()), baseline_name=name, paper="ahead",
            headline=headline,
        )  # fmt: skip

    figures = [against("DPO beta=0.1", True), against("shuffled c=10", True)]
    equal, there = _at_equal_kl(found)
    figures.append(
        figure(f"Reward of {ADAPTIVE} minus that of a constant strength at its divergence", "VADER compound",
               equal, 0.0, 0.0, ours=float(ours.mean()), baseline=there, baseline_name="contrast, between k",
               paper="ahead", headline=True)
    )  # fmt: skip
    return figures + [against(name, False) for name in ("DPO beta=0.01",) if name in found]


def _at_equal_kl(found: dict[str, list[Measured]]) -> tuple[Interval, float]:
    """Ours against the line through reference, DPO and the constant strengths, read off at our divergence; beyond
    its ends it is level."""
    names = ("reference", "DPO beta=0.1", "contrast k=1", "contrast k=4")
    table = {n: (_by_opening(found[n], "kl"), _by_opening(found[n], "reward")) for n in (*names, ADAPTIVE)}

    def line(items: NDArray[np.int64]) -> float:
        points = sorted((float(table[n][0][items].mean()), float(table[n][1][items].mean())) for n in names)
        x, y = np.array(points).T
        return float(np.interp(table[ADAPTIVE][0][items].mean(), x, y))

    count = len(table[ADAPTIVE][0])
    gain = bootstrap(lambda items: float(table[ADAPTIVE][1][items].mean()) - line(items), count)
    return gain, line(np.arange(count))


def _row(name: str, rows: Sequence[Measured]) -> dict[str, Any]:
    return {
        "method": name,
        "seeds": len(rows),
        "reward": str(mean_interval(_by_opening(rows, "reward"))),
        "kl": round(float(_by_opening(rows, "kl").mean()), 3),
        "distinct": round(float(_by_opening(rows, "distinct").mean()), 3),
        "tokens": round(float(_by_opening(rows, "tokens").mean()), 1),
    }


def _frontier(found: dict[str, list[Measured]]) -> dict[str, Any]:
    lines = []
    for family in ("DPO", "theorem1", "contrast", "adaptive", "shuffled", "on-policy"):
        points = sorted(
            (float(_by_opening(rows, "kl").mean()), mean_interval(_by_opening(rows, "reward")))
            for name, rows in found.items()
            if name.startswith(family)
        )
        lines.append(
            {"name": family, "x": [x for x, _ in points], "y": [y.value for _, y in points],
             "low": [y.low for _, y in points], "high": [y.high for _, y in points]}
        )  # fmt: skip
    return {
        "title": "Reward and distance from the reference",
        "x_label": "KL(policy || reference) of a text, in nats",
        "y_label": "VADER compound",
        "lines": [each for each in lines if each["x"]],
    }
