"""AlignDistil (arXiv 2503.02832): does a teacher made by token of two DPO models teach more than either alone?

The paper has it ahead of DPO and other losses on AlpacaEval 2, MT-Bench and Arena-Hard. Here SmolLM2's last layers
learn to write gladder continuations (see `reproduce.sentiment`): from the chosen responses, as the authors' second
setting has it, by teachers of every mode, with DPO at two strengths beside them. Two controls decide what the
adaptive strength is worth: the same strength everywhere, read off at the same distance from the reference, and the
same strengths shuffled within each response. How fast it learns is measured on the policy's own texts, against the
same teacher's word on the written tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenworks.core.measure import Indices, Interval, bootstrap, bootstrap_with_seeds, mean_interval
from tokenworks.reproduce import Run
from tokenworks.reproduce.distilling import BETA0, EVERY, Setting, Study
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.preferring import word_auc
from tokenworks.reproduce.result import Figure, Result, figure, line
from tokenworks.reproduce.sentiment import LEARNING_RATE, MODEL, NEW_TOKENS, PAIRS, SAMPLES
from tokenworks.reproduce.writing import Measured

ADAPTIVE = "adaptive c=10"
"""The authors' setting for given responses, and the one that is judged."""

Floats = NDArray[np.float64]
Curves = dict[str, list[list[list[float]]]]
"""By way: of each seed, after every `EVERY` steps, the reward on every opening."""

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
    "plausible c=10": Setting("aligndistil", 10, plausible=0.1),
    "theorem1 k=1": Setting("theorem1", 1),
    "theorem1 k=2": Setting("theorem1", 2),
    "theorem1 k=4": Setting("theorem1", 4),
    "on-policy c=15": Setting("aligndistil", 15, on_policy=True),
}
"""For the first seed alone."""

OURS, SAMPLED = "whole distribution", "written token"
SPEED = {
    OURS: Setting("aligndistil", 15, on_policy=True),
    SAMPLED: Setting("aligndistil", 15, on_policy=True, sampled=True),
}
"""Learning curves for every seed."""

GAIN = 0.9
"""Share of DPO's gain that has to be reached."""


def run(settings: Run) -> Result:
    """Measure, in about twenty minutes a seed on one CPU core; `quick` takes four minutes."""
    begun = time.perf_counter()
    seeds = 1 if settings.quick else settings.seeds
    study = Study(4 if settings.quick else 25, 3 if settings.quick else None)
    facts = {"openings": len(study.prompts), "samples": SAMPLES, "steps": study.steps, "beta0": BETA0}
    ledger = Ledger(settings.folder / "unfinished" / "aligndistil", {**facts, "torch": torch.__version__})
    found: dict[str, list[Measured]] = {}
    pieces = [piece for seed in range(seeds) for piece in _judged(study, seed)]
    if not settings.quick:
        pieces += _others(study)
    total = len(pieces) + seeds * len(SPEED)
    for number, (name, seed, work) in enumerate(pieces):
        settings.progress(number, total, f"{name}, seed {seed}")
        found.setdefault(name, []).append(ledger.once(f"{name} {seed}", work))
    curves: Curves = {way: [] for way in SPEED}
    for seed in range(seeds):
        for way, setting in SPEED.items():
            settings.progress(len(pieces) + sum(map(len, curves.values())), total, f"{way}, seed {seed}")
            curves[way].append(ledger.once(f"curve {way} {seed}", partial(study.curve, setting, seed)))
    strengths = ledger.once("alphas", lambda: study.alphas(0))
    settings.progress(total, total, "done")
    result = Result(
        slug="aligndistil",
        claim="",
        figures=[*_figures(found), _speed(found, curves), _seen_by_alpha(strengths)],
        seeds=list(range(seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={
            **facts,
            "pairs_a_step": PAIRS,
            "learning_rate": LEARNING_RATE,
            "new_tokens": NEW_TOKENS,
            "mean alpha": round(float(np.mean([a for row in strengths["alphas"] for a in row])), 3),
        },
        table=[_row(name, rows) for name, rows in found.items()],
        series=[_frontier(found), _plot(found, curves)],
        traces=ledger.once("traces", study.traces),
        notes=[
            "A seed varies the order of the data in DPO, reverse DPO and distillation, and what is sampled.",
            "The authors train for an epoch of 64,000 prompts and judge with large models; here it is an epoch of "
            "287 pairs and a lexicon.",
            f"What never reaches {GAIN:.0%} of DPO's gain is counted as if it had needed twice its steps.",
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
    return figures + [against(name, False) for name in ("DPO beta=0.01", "plausible c=10") if name in found]


def steps_needed(rewards: Floats, level: float) -> int:
    """The first step at which a curve has `level`; twice all of them if it never has."""
    above = np.flatnonzero(rewards >= level)
    return EVERY * int(above[0] + 1 if len(above) else 2 * len(rewards))


def _speed(found: dict[str, list[Measured]], curves: Curves) -> Figure:
    """Steps of the sampled way by those of ours; resampling openings, and seeds with them."""
    names = ("reference", "DPO beta=0.1")
    before, after = (np.array([row["reward"] for row in found[name]]) for name in names)
    ways = {way: np.array(each) for way, each in curves.items()}

    def steps(way: str, items: Indices, seeds: Indices) -> int:
        begin, end = before[seeds][:, items].mean(), after[seeds][:, items].mean()
        return steps_needed(ways[way][seeds][:, :, items].mean((0, 2)), begin + GAIN * (end - begin))

    def times(items: Indices, seeds: Indices) -> float:
        return steps(SAMPLED, items, seeds) / steps(OURS, items, seeds)

    count, openings = before.shape
    every = np.arange(openings), np.arange(count)
    return figure(
        f"Steps to {GAIN:.0%} of DPO's gain, from the written token by those from the whole distribution", "ratio",
        bootstrap_with_seeds(times, openings, count), 2.0, 1.0, ours=steps(OURS, *every),
        baseline=steps(SAMPLED, *every), baseline_name=SAMPLED, headline=True, paper="over twice as fast",
    )  # fmt: skip


def _seen_by_alpha(strengths: dict[str, Any]) -> Figure:
    known = word_auc(strengths["alphas"], strengths["valued"])
    return figure(
        "Strength at words with a value against other tokens", "AUC", known, 0.5, 0.5, ours=known.value,
        baseline=0.5, baseline_name="chance",
    )  # fmt: skip


def _plot(found: dict[str, list[Measured]], curves: Curves) -> dict[str, Any]:
    lines = []
    for way, seeds in curves.items():
        points = np.array(seeds).mean(0)
        begin = [_by_opening(found["reference"], "reward"), *points]
        lines.append(line(way, [EVERY * n for n in range(len(begin))], [mean_interval(each) for each in begin]))
    return {
        "title": "Learning on its own texts",
        "x_label": "steps",
        "y_label": "VADER compound",
        "lines": lines,
    }


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
        "kl": round(float(_by_opening(rows, "kl").mean()), 3) if "kl" in rows[0] else "",
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
        lines.append(line(family, [x for x, _ in points], [y for _, y in points]))
    return {
        "title": "Reward and distance from the reference",
        "x_label": "KL(policy || reference) of a text, in nats",
        "y_label": "VADER compound",
        "lines": [each for each in lines if each["x"]],
    }
