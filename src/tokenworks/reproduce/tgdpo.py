"""TGDPO (arXiv 2506.14574): is DPO better with the token rewards of a model that DPO has aligned already?

The paper reports win rates above DPO's of up to 7.5 points. Here, on the preference harness
(`reproduce.sentiment`): DPO gives the guide; TGDPO starts again from the reference on the same pairs, with the
paper's alpha of 0.5 and with the largest alpha that keeps 99% of the weights positive. Against it stand DPO
itself, DPO for as many steps as guide and TGDPO took together, and TGDPO with each response's weights shuffled,
which tells whether it matters which token gets which weight. Whether the guide knows the tokens that matter is
checked by the words of VADER's lexicon.
"""

from __future__ import annotations

import time
import warnings
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.align.reading import Batch
from tokenworks.align.tgdpo import TGDPO
from tokenworks.reproduce import Run
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.preferring import (
    SHOWN,
    Remembered,
    Score,
    by_response,
    frontier,
    matched_divergence,
    row,
    trace,
    valences,
    word_auc,
)
from tokenworks.reproduce.result import Figure, Result, figure
from tokenworks.reproduce.sentiment import LEARNING_RATE, MODEL, PAIRS, TRAINED, Sentiment
from tokenworks.reproduce.weighing import HeldOut, Seen

BETA, ALPHA = 0.1, 0.5
POSITIVE = 0.99
"""Share of weights that the large alpha keeps above 0."""

EPOCHS = 0.5
"""Each seed trains on its own half of the pairs."""

OPENINGS = 50
"""Held out, with four texts each."""

LONG_PAIRS, LONG_EPOCHS = 32, 6
"""Of the comparison of many epochs on few pairs."""

DPO_, TWICE, OURS, LARGE, SHUFFLED = (
    "DPO",
    "DPO, twice the steps",
    "TGDPO",
    "TGDPO, large alpha",
    "shuffled weights",
)
METHODS = (DPO_, OURS, LARGE, SHUFFLED)
LONG = ("DPO, long", "TGDPO, long")
ONCE = (TWICE, *LONG)
"""Run with the first seed alone."""

Piece = dict[str, Any]


def run(settings: Run) -> Result:
    """Measure, in about six minutes a seed on one CPU core; `quick` takes four in all."""
    begun = time.perf_counter()
    epochs, count = (0.1, 20) if settings.quick else (EPOCHS, OPENINGS)
    facts = {
        "pairs a step": PAIRS, "epochs": epochs, "learning rate": LEARNING_RATE, "layers trained": TRAINED,
        "openings": count, "beta": BETA, "alpha": ALPHA, "positive weights": POSITIVE,
        "long": None if settings.quick else [LONG_PAIRS, LONG_EPOCHS],
    }  # fmt: skip
    ledger = Ledger(settings.folder / "unfinished" / "tgdpo", {**facts, "torch": torch.__version__})
    bench = Sentiment()
    texts = HeldOut(bench, count, settings.progress)
    once = (TWICE,) if settings.quick else ONCE
    total = settings.seeds * (len(METHODS) + 1) + len(once)
    found: dict[str, list[Seen]] = {}
    guides: list[Piece] = []
    traces = []
    for seed in range(settings.seeds):
        taught = _Taught(bench, texts, seed, epochs)
        settings.progress(seed * (len(METHODS) + 1), total, f"guide, seed {seed}")
        guides.append(ledger.once(f"guide/{seed}", taught.guide_facts))
        for number, name in enumerate((*METHODS, *(once if seed == 0 else ())), start=1):
            settings.progress(seed * (len(METHODS) + 1) + number, total, f"{name}, seed {seed}")
            done = ledger.once(f"{name}/{seed}", partial(taught.measure, name, guides[seed]["alpha"]))
            found.setdefault(name, []).append(done["seen"])
            traces += [done["trace"]] if done["trace"] else []
    settings.progress(total, total, "done")
    result = Result(
        slug="tgdpo",
        claim="",
        figures=_figures(texts, found, guides),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={**facts, "large alpha": [round(guide["alpha"], 3) for guide in guides]},
        table=[row(texts, name, seen) for name, seen in found.items()],
        series=[
            frontier(texts, {name: [seen] for name, seen in found.items()}, "Reward against divergence"),
            _histogram(guides),
        ],
        traces=traces[:1],
        notes=[
            "Win rates are by VADER's score, a text of each policy to the same opening, ties split; texts are "
            "those of the reference, weighed as the policies would write them.",
            f"With alpha {ALPHA} the weights lie between {min(min(g['usual']) for g in guides):.3f} and "
            f"{max(max(g['usual']) for g in guides):.3f}: responses of a sentence and a guide near its reference "
            "leave the method next to nothing to say, so the claim is judged with the large alpha.",
            "The paper trains 2B to 8B models on UltraFeedback and asks GPT-4 which answer is better.",
        ],
    )
    ledger.close()
    return result


class _Taught:
    """One seed's guide, its token rewards, and what is trained with them."""

    def __init__(self, bench: Sentiment, texts: HeldOut, seed: int, epochs: float) -> None:
        self.bench, self.texts, self.seed, self.epochs = bench, texts, seed, epochs
        self._reward = Remembered(lambda batch: BETA * bench.token_rewards(self.guide, batch))

    @cached_property
    def guide(self) -> PreTrainedModel:
        return self.bench.dpo(self.seed, BETA, self.epochs)

    def guide_facts(self) -> Piece:
        """The large alpha, weights at both, and how the guide scores the tokens of the held-out pairs."""
        signed = np.concatenate([_signed(self._reward(batch), batch) for batch in self._train_batches()])
        # A weight is 1 + alpha x signed; the lowest per cent may fall to 0 and below.
        alpha = -1 / min(float(np.quantile(signed, 1 - POSITIVE)), -1e-6)
        rewards, right = [], []
        for start in range(0, len(self.texts.pairs), PAIRS):
            pairs = self.texts.pairs[start : start + PAIRS]
            batch = self.bench.collate(pairs)
            for place, numbers in enumerate(by_response(batch, self._reward(batch))):
                side = 1 if place < len(pairs) else -1
                pair = pairs[place % len(pairs)].pair
                rewards.append([side * number for number in numbers])
                right.append(
                    [side * v > 0 for v in valences(self.bench, pair.chosen if side > 0 else pair.rejected)]
                )
        found = {name: np.quantile(1 + factor * signed, np.linspace(0, 1, 41)).tolist()
                 for name, factor in (("usual", ALPHA), ("large", alpha))}  # fmt: skip
        return {"alpha": alpha, "rewards": rewards, "right": right, **found}

    def _train_batches(self) -> list[Batch]:
        kept = self.bench.train_pairs[::3]
        return [self.bench.collate(kept[start : start + PAIRS]) for start in range(0, len(kept), PAIRS)]

    def measure(self, name: str, large: float) -> Piece:
        bench, seed = self.bench, self.seed
        if name == DPO_:
            policy = self.guide
        elif name == TWICE:
            policy = bench.dpo(seed, BETA, 2 * self.epochs)
        else:
            alpha = large if name in (LARGE, SHUFFLED) else ALPHA
            if name in LONG:
                alpha = 0.0 if name == LONG[0] else large
            method = TGDPO(BETA, alpha)
            score: Score = self._shuffled if name == SHUFFLED else self._reward
            epochs, pairs = (
                (LONG_EPOCHS, bench.train_pairs[::6][:LONG_PAIRS]) if name in LONG else (self.epochs, None)
            )
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of the large alpha's weights a hundredth is not above 0, as meant
                policy = bench.train(method, epochs, seed, score, pairs=pairs)
            if name == LARGE and seed == 0:
                shown = trace(bench, policy, method, self.texts.pairs[SHOWN], "TGDPO after training", self._reward)
                return {"seen": self.texts.read(policy), "trace": shown}
        return {"seen": self.texts.read(policy), "trace": {}}

    def _shuffled(self, batch: Batch) -> Tensor:
        """The guide's rewards, each response's in another order."""
        scores = self._reward(batch).clone()
        for place, inside in enumerate(batch.mask):
            random = torch.Generator().manual_seed(1000 * self.seed + int(batch.input_ids[place].sum()) % 997)
            own = scores[place, inside]
            scores[place, inside] = own[torch.randperm(len(own), generator=random)]
        return scores


def _signed(rewards: Tensor, batch: Batch) -> np.ndarray[Any, Any]:
    """What alpha is multiplied with in the weights: the reward of chosen tokens, its negative of rejected ones."""
    half = len(rewards) // 2
    found: np.ndarray[Any, Any] = torch.cat(
        [rewards[:half][batch.mask[:half]], -rewards[half:][batch.mask[half:]]]
    ).numpy()
    return found


def _figures(texts: HeldOut, found: dict[str, list[Seen]], guides: list[Piece]) -> list[Figure]:
    """Thresholds are the dossier's, fixed before anything was run: win rates above a half, no more divergence for
    the reward, and a guide that knows the words better than chance."""
    figures = []
    for ours, theirs, headline in (
        (LARGE, DPO_, True), (LARGE, SHUFFLED, True), (LARGE, TWICE, False), (OURS, DPO_, False),
    ):  # fmt: skip
        count = len(found[theirs])
        won = texts.win_rate(found[ours][:count], found[theirs])
        figures.append(
            figure(f"Win rate of {ours} over {theirs}", "share", won, 0.5, 0.5, ours=won.value, baseline=0.5,
                   baseline_name=theirs, headline=headline, paper="up to 7.5 points above DPO" if headline else "")
        )  # fmt: skip
    matched = matched_divergence(texts, found[LARGE], found[DPO_])
    figures.append(
        figure("Reward for each root of divergence, TGDPO with large alpha by DPO", "ratio", matched, 1.0, 1.0,
               ours=matched.value, baseline=1.0, baseline_name=DPO_, headline=True)
    )  # fmt: skip
    scores = [row for guide in guides for row in guide["rewards"]]
    known = word_auc(scores, guides[0]["right"])
    figures.append(
        figure("Guide's reward of lexicon words of the right sign against other tokens", "AUC", known, 0.5, 0.5,
               ours=known.value, baseline=0.5, baseline_name="chance")
    )  # fmt: skip
    if LONG[0] in found:
        kept = texts.difference(found[LONG[1]], found[LONG[0]], "reward")
        figures.append(
            figure(f"Reward after {LONG_EPOCHS} epochs on {LONG_PAIRS} pairs, TGDPO less DPO", "VADER", kept,
                   0.0, 0.0, ours=texts.mean(found[LONG[1]], "reward"),
                   baseline=texts.mean(found[LONG[0]], "reward"), baseline_name="DPO",
                   paper="43.9 against 30.7 (AlpacaEval 2, trained to convergence)")
        )  # fmt: skip
    return figures


def _histogram(guides: list[Piece]) -> dict[str, Any]:
    shares = np.linspace(0, 1, 41).tolist()
    return {
        "title": "Weights of tokens, first seed",
        "x_label": "weight",
        "y_label": "share of tokens with a lower one",
        "lines": [{"name": f"{name} alpha", "x": guides[0][name], "y": shares} for name in ("usual", "large")],
    }
