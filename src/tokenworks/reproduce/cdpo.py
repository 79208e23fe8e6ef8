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

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenworks.align.critical import pass_at_k
from tokenworks.core.measure import Indices, Interval, auc, bootstrap, bootstrap_with_seeds, mean_interval
from tokenworks.core.trace import Trace
from tokenworks.reproduce import Run, hand_checked
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.lessons import (
    BETA,
    DETECTORS,
    EPOCHS,
    GAMMA,
    METHODS,
    OURS,
    RATES,
    ROLLOUTS,
    SHUFFLED,
    TRIAL_SEED,
    Lesson,
    Piece,
    best_rates,
    greedy_accuracy,
    wrong_chains,
)
from tokenworks.reproduce.reasoner import STEPS, Reasoner, load_reasoner, questions
from tokenworks.reproduce.result import Figure, Result, exact, figure, line

KS = (1, 2, 4, 8, 16, 32, 64)
K = 8
"""Of pass@k in the figures."""

AHEAD = 1e-9
"""What a difference has to reach: a tie confirms nothing."""


def run(settings: Run) -> Result:
    """Measure, in about fifteen minutes and five a seed on one CPU core, and twelve once to train the reasoner;
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
    truth = ledger.once("rollouts", lambda: wrong_chains(reasoner, wrong))
    base = ledger.once("base", lambda: greedy_accuracy(reasoner, reasoner.model, test))
    best = best_rates(Lesson(reasoner, asked, samples, TRIAL_SEED), rates, ledger)
    found: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    detected: list[Piece] = []
    for seed in range(settings.seeds):
        lesson = Lesson(reasoner, asked, samples, seed)
        settings.progress(1 + seed * (1 + len(METHODS)), total, f"right and wrong models, seed {seed}")
        detected.append(ledger.once(f"detection/{seed}", partial(lesson.detect, truth)))
        for number, name in enumerate(METHODS, start=2):
            settings.progress(seed * (1 + len(METHODS)) + number, total, f"{name}, seed {seed}")
            done = ledger.once(f"{name}/{seed}", partial(lesson.accuracy, name, best[name], test))
            found[name].append(done)
    marked = None if settings.quick else ledger.once("SmolLM2", hand_checked.demonstrate)
    settings.progress(total, total, "done")
    result = Result(
        slug="cdpo",
        claim="",
        figures=[*_detection(truth, detected), *_replacement(truth), *_training(found), *_marked(marked)],
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=f"a Llama of {reasoner.model.num_parameters() / 1e6:.1f}M weights, chains of sums",
        settings=facts | {"rate of each": best, "data": [piece["data"] for piece in detected]},
        table=_table(base, found),
        series=[_pass_plot(truth)],
        traces=[_trace(reasoner, truth[row], detected[0], row) for row in range(min(2, len(truth)))]
        + ([] if marked is None else marked["traces"]),
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
                    f"AUC for the {said}, contrastive less {other}", "area", gap, AHEAD, 0.0, ours=own,
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
                f"pass@{K}, the critical token replaced less {name}", "share", gap, AHEAD, 0.0,
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
    return bootstrap_with_seeds(lambda items, seeds: float(gaps[seeds][:, items].mean()), gaps.shape[1], len(gaps))


def _training(found: dict[str, list[list[float]]]) -> list[Figure]:
    papers = {"DPO": "67.9% against 59.7% (GSM8K, Llama 3 8B)", "RPO": "67.9% against 67.5%"}
    return [
        figure(
            f"Greedy accuracy, cDPO less {other}", "share", _difference(found, OURS, other), AHEAD, 0.0,
            ours=float(np.mean(found[OURS])), baseline=float(np.mean(found[other])), baseline_name=other,
            paper=papers.get(other, ""), headline=other in ("DPO", SHUFFLED),
        )
        for other in METHODS if other != OURS
    ]  # fmt: skip


def _marked(found: Piece | None) -> list[Figure]:
    """On SmolLM2's own wrong answers: a demonstration, beside the verdict."""
    if found is None:
        return []
    chains = found["chains"]

    def area(name: str, items: Indices) -> float:
        flags = [place == chains[i]["critical"] for i in items for place in range(len(chains[i]["ids"]))]
        return auc([value for i in items for value in chains[i][name]], flags)

    def gap(items: Indices) -> float:
        return area("contrastive", items) - area("surprise", items)

    every = np.arange(len(chains))
    return [
        figure(
            f"SmolLM2: AUC for the marked token of {len(chains)} wrong answers, contrastive less surprise", "area",
            bootstrap(gap, len(chains)), AHEAD, 0.0, ours=area("contrastive", every),
            baseline=area("surprise", every), baseline_name="surprise",
        )
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
