"""cDPO (arXiv 2411.19943): are wrong chains lost at single tokens, are these found cheaply, and does it help DPO?

The paper finds such tokens by rollouts of 7B to 70B models on GSM8K and MATH, and reports that DPO which pushes
down mainly them is ahead of plain DPO by some points. A model that runs here solves none of those, so that a small
one of our own reasons (`reproduce.reasoner`: chains of three sums, letter by letter) and errs by itself. Measured
are:

A. does contrastive estimation find the critical tokens that rollouts define, better than the model's own surprise
   or uncertainty does;
B. are chains saved by another token at the critical place, and more than by one elsewhere;
C. greedy accuracy on held-out questions after training on the same pairs with each loss.

Questions, samples, pairs and the two models of contrastive estimation are a seed's own; reasoner and rollouts are
not.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.align.cdpo import CDPO
from tokenworks.align.contract import Needs, Outcome, Pairs, PreferenceMethod, halves
from tokenworks.align.critical import (
    Sample,
    StartupData,
    build_startup_data,
    critical_tokens_by_rollout,
    pass_at_k,
    replacement_test,
)
from tokenworks.align.dpo import DPO
from tokenworks.align.reading import EncodedPair, collate, encode_pair, read_pairs
from tokenworks.align.rollouts import sample_continuations
from tokenworks.align.scores import contrastive_scores, response_states
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.measure import Indices, Interval, auc, bootstrap, mean_interval
from tokenworks.core.sampling import Sampling
from tokenworks.core.trace import Trace
from tokenworks.core.training import fit
from tokenworks.reproduce import Run
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.reasoner import (
    LONGEST,
    STEPS,
    Question,
    Reasoner,
    answer,
    first_wrong,
    is_right,
    load_reasoner,
    questions,
    rows,
)
from tokenworks.reproduce.result import Figure, Result, exact, figure, line

BETA, GAMMA = 0.1, 1.0
ROLLOUTS = 64
PAIRS, EPOCHS = 16, 3
"""Of preference training."""

RATES = (1e-5, 3e-5, 1e-4)
"""Each method trains at the one that did best for it with a lesson and on questions used for nothing else."""

TRIAL_SEED, TRIAL_QUESTIONS = 1000, 400

TUNED_ROWS, TUNED_RATE, TUNED_EPOCHS = 32, 3e-4, 3
"""Of the models of right and of wrong chains, and of training on right ones alone."""

KS = (1, 2, 4, 8, 16, 32, 64)
K = 8
"""Of pass@k in the figures."""

OURS, RELEASED, SHUFFLED, SFT = "cDPO", "cDPO, released", "cDPO, shuffled scores", "right chains only"
METHODS = (SFT, "DPO", "RPO", OURS, RELEASED, SHUFFLED)
DETECTORS = ("contrastive", "surprise", "entropy", "random")

Piece = dict[str, Any]


def run(settings: Run) -> Result:
    """Measure, in about five minutes and five a seed on one CPU core, and twelve once to train the reasoner;
    `quick` takes three in all, and as long once."""
    begun = time.perf_counter()
    asked, samples, wrong, held = (80, 8, 6, 100) if settings.quick else (400, 16, 24, 1000)
    rates = RATES[:1] if settings.quick else RATES
    facts = {
        "questions": asked, "samples": samples, "wrong chains": wrong, "held-out questions": held, "beta": BETA,
        "gamma": GAMMA, "rollouts": ROLLOUTS, "reasoner's steps": STEPS, "rates": list(rates), "epochs": EPOCHS,
    }  # fmt: skip
    ledger = Ledger(settings.folder / "unfinished" / "cdpo", {**facts, "torch": torch.__version__})
    total = 1 + settings.seeds * (1 + len(METHODS))
    reasoner = load_reasoner(progress=settings.progress)
    test = questions("test", held)
    settings.progress(0, total, "rollouts")
    truth = ledger.once("rollouts", lambda: _truth(reasoner, wrong))
    base = ledger.once("base", lambda: _accuracy(reasoner, reasoner.model, test))
    best = _best_rates(_Lesson(reasoner, asked, samples, TRIAL_SEED), rates, ledger)
    found: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    detected: list[Piece] = []
    for seed in range(settings.seeds):
        lesson = _Lesson(reasoner, asked, samples, seed)
        settings.progress(1 + seed * (1 + len(METHODS)), total, f"right and wrong models, seed {seed}")
        detected.append(ledger.once(f"detection/{seed}", partial(lesson.detect, truth)))
        for number, name in enumerate(METHODS, start=2):
            settings.progress(seed * (1 + len(METHODS)) + number, total, f"{name}, seed {seed}")
            done = ledger.once(f"{name}/{seed}", partial(lesson.accuracy, name, best[name], test))
            found[name].append(done)
    settings.progress(total, total, "done")
    result = Result(
        slug="cdpo",
        claim="",
        figures=[*_detection(truth, detected), *_replacement(truth), *_training(found)],
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=f"a Llama of {reasoner.model.num_parameters() / 1e6:.1f}M weights, chains of sums",
        settings=facts | {"rate of each": best, "data": [piece["data"] for piece in detected]},
        table=_table(base, found),
        series=[_pass_plot(truth)],
        traces=[_trace(reasoner, truth[row], detected[0], row) for row in range(min(2, len(truth)))],
        notes=[
            f"The reasoner is right in {np.mean([each['accuracy'] for each in detected]):.0%} of its samples at "
            f"temperature 1 and in {np.mean(base):.0%} of its greedy answers: little is left for training to win.",
            f"{asked} questions and {samples} samples of each a seed, where the authors have thousands and 64; "
            "all weights are tuned, where they tune LoRA.",
            "The loss of the authors' code averages over positions, padding included; with Adam its scale does "
            "not matter, the sigmoid at every token does.",
        ],
    )
    ledger.close()
    return result


# --- rollouts -------------------------------------------------------------------------------------------------


def _write(reasoner: Reasoner, chosen: Sequence[Question], n: int, seed: int) -> list[list[str]]:
    """`n` answers to each question, at temperature 1; greedy ones if n is 0."""
    tokenizer = reasoner.tokenizer
    prompts = [list(tokenizer(q.prompt)["input_ids"]) for q in chosen]
    sampling = Sampling(1.0 if n else 0.0)
    written = sample_continuations(
        reasoner.model, prompts, max(1, n), LONGEST, sampling, [tokenizer.eos_token_id], seed
    )
    return [[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in own] for own in written]


def _truth(reasoner: Reasoner, count: int) -> list[Piece]:
    """Wrong chains, where rollouts say that they were lost, and what another token there would do."""
    found: list[Piece] = []
    chosen = questions("lessons", 20 * count, seed=10_000)
    written = _write(reasoner, chosen, 1, seed=0)
    lost = [(q, own[0]) for q, own in zip(chosen, written, strict=True) if not is_right(q.prompt)(own[0])]
    for question, text in lost[:count]:
        common: Piece = {"top_p": 1.0, "max_new_tokens": LONGEST, "n": ROLLOUTS, "seed": len(found)}
        args = (reasoner.model, reasoner.tokenizer, question.prompt, text)
        by_rollout = critical_tokens_by_rollout(*args, is_right(question.prompt), **common)
        piece: Piece = {
            "prompt": question.prompt, "text": text, "index": by_rollout.index, "scores": by_rollout.scores,
            "wrong": first_wrong(text, question.chain), "ids": by_rollout.token_ids,
        }  # fmt: skip
        if by_rollout.index is not None and by_rollout.index < len(text):
            others = [place for place in range(len(text)) if place != by_rollout.index]
            elsewhere = random.Random(len(found)).choice(others)
            for name, place in (("critical", by_rollout.index), ("elsewhere", elsewhere)):
                tried = replacement_test(*args, place, is_right(question.prompt), **common)
                piece[name] = {"kept": tried.kept, "replaced": tried.replaced, "place": place}
        found.append(piece)
    return found


# --- what a seed trains ---------------------------------------------------------------------------------------


class _Lesson:
    """The samples of a seed, the models of right and of wrong chains, and policies trained on the pairs."""

    def __init__(self, reasoner: Reasoner, asked: int, samples: int, seed: int) -> None:
        self.reasoner, self.seed = reasoner, seed
        self._asked, self._samples = asked, samples
        self._made: tuple[StartupData, PreTrainedModel, PreTrainedModel, list[EncodedPair], float] | None = None

    def _make(self) -> tuple[StartupData, PreTrainedModel, PreTrainedModel, list[EncodedPair], float]:
        """Once, and only if a piece of this seed is not done yet."""
        if self._made is None:
            chosen = questions("lessons", self._asked, self.seed)
            written = _write(self.reasoner, chosen, self._samples, self.seed)
            samples = {
                q.prompt: [Sample(text, answer(text)) for text in own]
                for q, own in zip(chosen, written, strict=True)
            }
            right = [is_right(prompt)(s.response) for prompt, own in samples.items() for s in own]
            data = build_startup_data(samples, is_right)
            p, n = (self._tuned(own, TUNED_RATE) for own in (data.positive, data.negative))
            score = contrastive_scores(p, n, GAMMA)
            pairs = []
            for prompt, chosen_text, rejected in data.pairs:
                pair = encode_pair(self.reasoner.tokenizer, prompt, chosen_text, rejected)
                good, bad = score(pair.prompt, pair.chosen), score(pair.prompt, pair.rejected)
                pairs.append(replace(pair, chosen_scores=good, rejected_scores=bad))
            self._made = data, p, n, pairs, sum(right) / len(right)
        return self._made

    def _tuned(self, texts: Sequence[tuple[str, str]], rate: float) -> PreTrainedModel:
        model = copy.deepcopy(self.reasoner.model)
        order = _order(len(texts), TUNED_EPOCHS, self.seed)

        def loss(step: int) -> Tensor:
            chosen = [texts[row] for row in order[step * TUNED_ROWS : (step + 1) * TUNED_ROWS]]
            ids, labels = rows(chosen, self.reasoner.tokenizer)
            found: Tensor = model(input_ids=ids, labels=labels).loss
            return found

        fit(model, loss, max(1, len(order) // TUNED_ROWS), rate, warmup=0.1)
        return model.eval()

    def detect(self, truth: Sequence[Piece]) -> Piece:
        """What each detector says of the tokens of the wrong chains; higher is more suspect."""
        data, p, n, pairs, accuracy = self._make()
        score, model = contrastive_scores(p, n, GAMMA), self.reasoner.model
        chance = random.Random(self.seed)
        suspicion: dict[str, list[list[float]]] = {name: [] for name in DETECTORS}
        for piece in truth:
            begin = list(self.reasoner.tokenizer(piece["prompt"])["input_ids"])
            suspicion["contrastive"].append([1 - s for s in score(begin, piece["ids"])])
            states = response_states(model, begin, piece["ids"])
            with torch.no_grad():
                terms = vocabulary_terms(Head.of(model), states, torch.tensor(piece["ids"]))
            suspicion["surprise"].append((-terms.log_p).tolist())
            suspicion["entropy"].append(terms.entropy.tolist())
            suspicion["random"].append([chance.random() for _ in piece["ids"]])
        sizes = {"positive": len(data.positive), "negative": len(data.negative), "pairs": len(pairs)}
        return {"suspicion": suspicion, "data": sizes, "accuracy": accuracy}

    def accuracy(self, name: str, rate: float, chosen: Sequence[Question]) -> list[float]:
        """Of each question, whether the greedy answer is right after training with a method."""
        return _accuracy(self.reasoner, self._trained(name, rate), chosen)

    def _trained(self, name: str, rate: float) -> PreTrainedModel:
        data, _, _, pairs, _ = self._make()
        if name == SFT:
            return self._tuned(data.positive, rate)
        if name == SHUFFLED:
            chance = random.Random(self.seed)
            pairs = [
                replace(pair, rejected_scores=_shuffled(pair.rejected_scores or [], chance)) for pair in pairs
            ]
        methods: dict[str, PreferenceMethod] = {
            "DPO": DPO(BETA), "RPO": _RPO(), OURS: CDPO(BETA), RELEASED: CDPO(BETA, reduction="released"),
            SHUFFLED: CDPO(BETA),
        }  # fmt: skip
        method = methods[name]
        policy, reference = copy.deepcopy(self.reasoner.model), self.reasoner.model
        order = _order(len(pairs), EPOCHS, self.seed)

        def loss(step: int) -> Tensor:
            batch = collate([pairs[row] for row in order[step * PAIRS : (step + 1) * PAIRS]])
            return method(read_pairs(policy, reference, batch, method.needs)).loss.mean()

        fit(policy, loss, max(1, len(order) // PAIRS), rate, warmup=0.1)
        return policy.eval()


def _best_rates(trial: _Lesson, rates: Sequence[float], ledger: Ledger) -> dict[str, float]:
    """Of each method, the learning rate with the highest greedy accuracy after the trial lesson."""
    chosen = questions("lessons", TRIAL_QUESTIONS, seed=20_000)
    best = {}
    for name in METHODS:
        right = {
            rate: sum(ledger.once(f"trial/{name}/{rate}", partial(trial.accuracy, name, rate, chosen)))
            for rate in rates
        }
        best[name] = max(right, key=lambda rate: right[rate])
    return best


class _RPO:
    """DPO, and the mean log-likelihood of the chosen tokens with weight 1 (arXiv 2404.19733)."""

    needs = Needs()

    def __call__(self, pairs: Pairs) -> Outcome:
        found = DPO(BETA)(pairs)
        chosen, _ = halves(pairs.log_p.sum(1) / pairs.mask.sum(1))
        return replace(found, loss=found.loss - chosen)


def _order(count: int, epochs: int, seed: int) -> list[int]:
    return [
        row for epoch in range(epochs) for row in random.Random(1000 * seed + epoch).sample(range(count), count)
    ]


def _shuffled(scores: Sequence[float], chance: random.Random) -> list[float]:
    """All but the end's, which counts fully anyway."""
    inner = list(scores[:-1])
    chance.shuffle(inner)
    return [*inner, scores[-1]]


def _accuracy(reasoner: Reasoner, model: PreTrainedModel, chosen: Sequence[Question]) -> list[float]:
    """Of each question, whether the greedy answer is right."""
    written = _write(replace(reasoner, model=model), chosen, 0, seed=0)
    return [float(is_right(q.prompt)(own[0])) for q, own in zip(chosen, written, strict=True)]


# --- figures: thresholds are the dossier's, above by more than chance -----------------------------------------


def _areas(truth: Sequence[Piece], detected: Sequence[Piece], name: str, target: str, items: Indices) -> float:
    """Mean over seeds of the area under the curve, tokens of all chains together."""
    kept = [int(i) for i in items if truth[i][target] is not None]
    flags = [place == truth[i][target] for i in kept for place in range(len(truth[i]["ids"]))]
    return float(np.mean([auc([v for i in kept for v in each["suspicion"][name][i]], flags) for each in detected]))


def _ahead(truth: Sequence[Piece], detected: Sequence[Piece], other: str, target: str, items: Indices) -> float:
    """Area of contrastive estimation less that of another detector."""
    one, two = (_areas(truth, detected, name, target, items) for name in ("contrastive", other))
    return one - two


def _hits(truth: Sequence[Piece], detected: Sequence[Piece], name: str, within: int, items: Indices) -> float:
    found = [
        abs(int(np.argmax(each["suspicion"][name][i])) - truth[i]["index"]) <= within
        for each in detected for i in items if truth[i]["index"] is not None
    ]  # fmt: skip
    return float(np.mean(found))


def _detection(truth: list[Piece], detected: list[Piece]) -> list[Figure]:
    every = np.arange(len(truth))
    figures = []
    for target, said in (("index", "critical tokens by rollouts"), ("wrong", "first wrong digit")):
        own = _areas(truth, detected, "contrastive", target, every)
        for other in DETECTORS[1:]:
            gap = bootstrap(partial(_ahead, truth, detected, other, target), len(truth), draws=1000)
            figures.append(
                figure(
                    f"AUC for the {said}, contrastive less {other}", "area", gap, 0.0, 0.0, ours=own,
                    baseline=_areas(truth, detected, other, target, every), baseline_name=other,
                    headline=target == "index",
                )
            )  # fmt: skip
    for within, said in ((0, "hits"), (1, "hits within one token")):
        found = bootstrap(partial(_hits, truth, detected, "contrastive", within), len(truth))
        others = {name: _hits(truth, detected, name, within, every) for name in DETECTORS[1:]}
        best = max(others, key=lambda name: others[name])
        figures.append(
            figure(
                f"Critical tokens that the most suspect token {said}", "share", found, others[best], others[best],
                ours=found.value, baseline=others[best], baseline_name=best,
            )
        )  # fmt: skip
    return figures


def _passes(truth: Sequence[Piece], where: str, what: str, k: int) -> list[float]:
    return [pass_at_k(ROLLOUTS, piece[where][what], k) for piece in truth if where in piece]


def _replacement(truth: list[Piece]) -> list[Figure]:
    replaced, kept, elsewhere = (
        np.array(_passes(truth, *which, K))
        for which in (("critical", "replaced"), ("critical", "kept"), ("elsewhere", "replaced"))
    )
    figures = []
    for other, name in ((kept, "kept"), (elsewhere, "a random token replaced")):
        gap = mean_interval(replaced - other)
        figures.append(
            figure(
                f"pass@{K}, the critical token replaced less {name}", "share", gap, 0.0, 0.0,
                ours=float(replaced.mean()), baseline=float(other.mean()), baseline_name=name, headline=True,
                paper="another token at the critical place turns hopeless chains into right ones",
            )
        )  # fmt: skip
    share = sum(piece["index"] is not None for piece in truth) / len(truth)
    figures.append(figure("Wrong chains with a critical token", "share", exact(share), 0.5, 0.5, ours=share))
    return figures


def _difference(found: dict[str, list[list[float]]], one: str, other: str) -> Interval:
    """Of accuracies, resampling questions and, in the same resample, seeds."""
    gaps = np.array(found[one]) - np.array(found[other])
    rng, every = np.random.default_rng(0), np.arange(gaps.shape[1])

    def mean(items: Indices) -> float:
        seeds = np.arange(len(gaps)) if np.array_equal(items, every) else rng.integers(len(gaps), size=len(gaps))
        return float(gaps[seeds][:, items].mean())

    return bootstrap(mean, gaps.shape[1])


def _training(found: dict[str, list[list[float]]]) -> list[Figure]:
    papers = {"DPO": "67.9% against 59.7% (GSM8K, Llama 3 8B)", "RPO": "67.9% against 67.5%"}
    return [
        figure(
            f"Greedy accuracy, cDPO less {other}", "share", _difference(found, OURS, other), 0.0, 0.0,
            ours=float(np.mean(found[OURS])), baseline=float(np.mean(found[other])), baseline_name=other,
            paper=papers.get(other, ""), headline=other in ("DPO", SHUFFLED),
        )
        for other in METHODS if other != OURS
    ]  # fmt: skip


def _table(base: list[float], found: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    every = {"untrained": [base]} | found
    return [
        {
            "method": name,
            "seeds": len(rows_),
            "greedy accuracy": f"{np.mean(rows_):.3f}",
            "of each seed": ", ".join(f"{np.mean(row):.3f}" for row in rows_),
        }
        for name, rows_ in every.items()
    ]


def _pass_plot(truth: list[Piece]) -> dict[str, Any]:
    lines = []
    for name, where, what in (
        ("critical token replaced", "critical", "replaced"), ("critical token kept", "critical", "kept"),
        ("random token replaced", "elsewhere", "replaced"),
    ):  # fmt: skip
        at = [mean_interval(_passes(truth, where, what, k)) for k in KS]
        lines.append(line(name, KS, at))
    return {
        "title": "Wrong chains, gone on with from one token",
        "x_label": "k", "y_label": "pass@k", "lines": lines,
    }  # fmt: skip


def _trace(reasoner: Reasoner, piece: Piece, detected: Piece, row: int) -> dict[str, Any]:
    trace = Trace.from_ids(piece["ids"], reasoner.tokenizer)
    trace.add("success", [s / ROLLOUTS for s in piece["scores"]], "right rollouts from behind the token", 0, 1)
    trace.add("weight", detected["suspicion"]["contrastive"][row], "1 - s, of the rejected token in cDPO", 0, 1)
    trace.add("surprise", detected["suspicion"]["surprise"][row], "-log p of the reasoner, in nats")
    trace.meta |= {
        "title": f"a wrong answer to {piece['prompt']}",
        "critical": piece["index"],
        "wrong": piece["wrong"],
    }
    return trace.to_dict()
