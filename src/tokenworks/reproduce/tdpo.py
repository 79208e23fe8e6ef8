"""TDPO (arXiv 2404.11999): does a divergence at every token keep the policy nearer for the same reward?

On IMDb the paper plots reward against sequential KL(reference || policy), and finds TDPO2 ahead of TDPO1 and
both ahead of DPO; and it says that the texts stay more diverse. Here the preference harness
(`reproduce.sentiment`) is trained with all three, the seeds drawing pairs and their order, and read on the held-
out openings (`reproduce.weighing`). Of each policy two numbers say where it stands against DPO's frontier: the
reward gained for each root of divergence, and the entropy of what it writes at equal reward.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from tokenworks.align.contract import PreferenceMethod
from tokenworks.align.dpo import DPO
from tokenworks.align.tdpo import TDPO
from tokenworks.reproduce import Run
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.preferring import SHOWN, frontier, matched_divergence, matched_entropy, row, trace
from tokenworks.reproduce.result import Figure, Result, exact, figure
from tokenworks.reproduce.sentiment import LEARNING_RATE, MODEL, PAIRS, TRAINED, Sentiment
from tokenworks.reproduce.weighing import HeldOut, Seen

BETA = 0.1
"""At which all seeds are run; `OTHER_BETAS` have one, of DPO and TDPO2."""

OTHER_BETAS = (0.5,)
METHODS = ("DPO", "TDPO1", "TDPO2")
EPOCHS = 0.5
"""Each seed trains on its own half of the pairs."""

OPENINGS = 50
"""Held out, with four texts each."""

Found = dict[tuple[str, float], list[Seen]]
"""Of each method and beta what was seen, a seed each."""


def run(settings: Run) -> Result:
    """Measure, in about five minutes a seed on one CPU core; `quick` takes three in all."""
    begun = time.perf_counter()
    epochs, count, betas = (0.1, 20, ()) if settings.quick else (EPOCHS, OPENINGS, OTHER_BETAS)
    facts = {
        "pairs a step": PAIRS, "epochs": epochs, "learning rate": LEARNING_RATE, "layers trained": TRAINED,
        "openings": count, "alpha": TDPO().alpha, "betas": [BETA, *betas],
    }  # fmt: skip
    ledger = Ledger(settings.folder / "unfinished" / "tdpo", {**facts, "torch": torch.__version__})
    bench = Sentiment()
    texts = HeldOut(bench, count, settings.progress)
    work = [(name, BETA, seed) for seed in range(settings.seeds) for name in METHODS]
    work += [(name, beta, 0) for beta in betas for name in (METHODS[0], METHODS[-1])]
    found: Found = {}
    traces = []
    for number, (name, beta, seed) in enumerate(work):
        settings.progress(number, len(work), f"{name}, beta {beta}, seed {seed}")

        def piece(name: str = name, beta: float = beta, seed: int = seed) -> dict[str, Any]:
            method = _method(name, beta)
            policy = bench.dpo(seed, beta, epochs) if name == "DPO" else bench.train(method, epochs, seed)
            shown = {}
            if name == "TDPO2" and beta == BETA and seed == 0:
                shown = trace(bench, policy, method, texts.pairs[SHOWN], "TDPO2 after training")
            return {"seen": texts.read(policy), "trace": shown}

        done = ledger.once(f"{name}/{beta}/{seed}", piece)
        found.setdefault((name, beta), []).append(done["seen"])
        traces += [done["trace"]] if done["trace"] else []
    reference = ledger.once("reference", lambda: texts.read(bench.reference))
    settings.progress(len(work), len(work), "done")
    result = Result(
        slug="tdpo",
        claim="",
        figures=_figures(texts, found, reference),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings=facts,
        table=[
            row(texts, "reference", [reference]),
            *(row(texts, f"{name}, beta {beta}", seen) for (name, beta), seen in found.items()),
        ],
        series=[
            frontier(
                texts,
                {name: [seen for (method, _), seen in found.items() if method == name] for name in METHODS},
                "Reward against divergence from the reference; each point one beta",
            )
        ],
        traces=traces,
        notes=[
            f"A tenth of the paper's smallest model, its last {TRAINED} layers, some hundred pairs: the policies "
            "stay near the reference, where the divergence has hardly a gradient and TDPO is all but DPO.",
            "Rewards and divergences are of texts of the reference, weighed as the policy would write them; "
            "no supervised stage comes before, as the pairs are the model's own.",
            "Points of different methods are matched by the gain for each root of divergence, which is constant "
            "along a frontier near the reference.",
        ],
    )
    ledger.close()
    return result


def _method(name: str, beta: float) -> PreferenceMethod:
    return DPO(beta) if name == "DPO" else TDPO(beta, variant=name.lower())


def _figures(texts: HeldOut, found: Found, reference: Seen) -> list[Figure]:
    """Thresholds are the dossier's, fixed before anything was run: no more divergence and no less entropy than
    DPO at equal reward."""
    figures = []
    held = []
    for beta in sorted({beta for _, beta in found}, key=lambda beta: beta != BETA):
        dpo, two = found["DPO", beta], found["TDPO2", beta]
        matched, entropy = matched_divergence(texts, two, dpo), matched_entropy(texts, two, dpo, reference)
        held.append(matched.low >= 1 and entropy.low >= 0)
        figures += [
            figure(
                f"Reward for each root of divergence, TDPO2 by DPO, beta {beta}", "ratio", matched, 1.0, 1.0,
                ours=matched.value, baseline=1.0, baseline_name="DPO", headline=beta == BETA,
                paper="TDPO2's frontier lies above DPO's (IMDb)",
            ),
            figure(
                f"Entropy at equal reward, TDPO2 less DPO, beta {beta}", "nats", entropy, 0.0, 0.0,
                ours=texts.mean(two, "entropy"), baseline=texts.mean(dpo, "entropy"), baseline_name="DPO",
                headline=beta == BETA, paper="4.915 against 3.196 (Anthropic-HH)",
            ),
        ]  # fmt: skip
        if beta != BETA:
            continue
        one = found["TDPO1", beta]
        gap, accuracy = texts.difference(dpo, two, "gap"), texts.difference(two, dpo, "accuracy")
        first, second = matched_divergence(texts, one, dpo), matched_divergence(texts, two, one)
        figures += [
            figure(
                "|D_w - D_l| of held-out pairs, DPO less TDPO2", "nats", gap, 0.001, 0.0,
                ours=texts.mean(two, "gap"), baseline=texts.mean(dpo, "gap"), baseline_name="DPO",
                paper="smaller with TDPO2 throughout training",
            ),
            figure(
                "Accuracy on held-out pairs, TDPO2 less DPO", "share", accuracy, 0.01, 0.0,
                ours=texts.mean(two, "accuracy"), baseline=texts.mean(dpo, "accuracy"), baseline_name="DPO",
                paper="67.33% against 59.43% (Anthropic-HH)",
            ),
            figure(
                "Reward for each root of divergence, TDPO1 by DPO", "ratio", first, 1.0, 1.0, ours=first.value,
                baseline=1.0, baseline_name="DPO", paper="TDPO1's frontier lies above DPO's (IMDb)",
            ),
            figure(
                "Reward for each root of divergence, TDPO2 by TDPO1", "ratio", second, 1.0, 1.0, ours=second.value,
                baseline=1.0, baseline_name="TDPO1", paper="TDPO2's frontier lies above TDPO1's (IMDb)",
            ),
        ]  # fmt: skip
    share = sum(held) / len(held)
    figures.append(
        figure("Betas at which both hold beyond chance", "share", exact(share), 1.0, 0.5, ours=share)
    )  # fmt: skip
    return figures
