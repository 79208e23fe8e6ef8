"""R2R (arXiv 2505.21600): does a learned router spend the large model's tokens better than entropy or chance?

The paper pairs reasoning models of 1.5 and 32 billion parameters, and reports the quality of a model of 14 billion
for 5.6 billion activated parameters a token. Here: SmolLM2-135M and the draft model of two layers that was
distilled from it, greedy, and no answers that could be marked. Quality is how far the text is from the large
model's own: its nats a token under the large model, of which a router recovers a part of the gap between both
models, and the longest common subsequence with what the large model alone answers.

Each router is run at several shares of large-model tokens: the learned one at its own threshold and at thresholds
for `TARGETS`, the others at thresholds for the same shares, all found on calibration prompts. What differs in
share even so is interpolated away, along the curve of the other router.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenworks.core.data import Prompt, prompts
from tokenworks.core.measure import Indices
from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode.distil import load_draft
from tokenworks.decode.r2r import RoutedDecoder, RoutedGeneration
from tokenworks.decode.r2r_routers import EntropyRouter, RandomRouter, Router
from tokenworks.decode.r2r_training import load_router
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.reproduce import Run
from tokenworks.reproduce.judge import log_probs
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, figure, line
from tokenworks.reproduce.routing import Found, Statistic

MODEL = "smollm2-135m"
TARGETS = (0.25, 0.5, 0.75)
"""Shares of large-model tokens that thresholds are sought for, beside the router's own."""

FEW = 0.25
"""The share of large-model tokens at which the gap is to be recovered: the most that the claim allows."""

ROUNDS = 4
"""Runs over the calibration prompts for one threshold, each half-way to the quantile of the last one's scores: the
more the large model writes, the higher they are, so that whole steps would swing about the goal."""

POINTS = ("own", *map(str, TARGETS))
RIVALS = ("entropy", "random")


def run(settings: Run) -> Result:
    """Measure, in about ten minutes with three seeds on one CPU core; `quick` takes two."""
    begun = time.perf_counter()
    bench = _Bench()
    count, new_tokens, lessons = (4, 24, 2) if settings.quick else (12, 48, 4)
    chosen, calibration = prompts(split="test", limit=count), prompts(split="calibration", limit=lessons)
    facts = {
        "prompts": [p.id for p in chosen],
        "calibration": [p.id for p in calibration],
        "max_new_tokens": new_tokens,
        "seeds": settings.seeds,
        "router": bench.router.threshold,
    }
    ledger = Ledger(settings.folder / "unfinished" / "r2r", {**facts, "torch": torch.__version__})
    settings.progress(0, count, "thresholds for equal shares")
    thresholds = ledger.once("thresholds", partial(bench.thresholds, calibration, new_tokens // 2))
    ways = _ways(bench.router, thresholds, settings.seeds)
    found = Found(POINTS)
    for turn, prompt in enumerate(chosen):
        settings.progress(turn, count, prompt.id)
        names = ["large", *ways]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == "large":
                work = partial(bench.large_alone, prompt, new_tokens)
            else:
                work = partial(bench.piece, prompt, *ways[name], new_tokens)
            found.add(name, ledger.once(f"{prompt.id}/{name}", work))
    traces = []
    for point in POINTS[:2]:
        trace = bench.write(chosen[0], *ways[f"R2R {point}"], new_tokens).trace(bench.loaded.tokenizer)
        trace.meta["title"] = f"R2R, threshold {ways[f'R2R {point}'][1]:.2f}: {chosen[0].text[:60]}"
        traces.append(trace.to_dict())
    settings.progress(count, count, "done")
    result = Result(
        slug="r2r",
        claim="",
        figures=_figures(found),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={**facts, "thresholds": thresholds, "sampling": "greedy", "dtype": str(bench.loaded.model.dtype)},
        table=_table(found, bench),
        series=_series(found),
        traces=traces,
        notes=[
            "Nats a token are those of the text under the large model. Greedy text that repeats itself has few, "
            "so distinct pairs of tokens and ROUGE-L against the large model's own answer stand beside.",
            "The small model has two layers and agrees with the large one on a third of the tokens; the "
            "paper's agrees on nine of ten. The router's labels come from word overlap, the paper's from a model "
            "of 72 billion parameters.",
        ],
    )
    ledger.close()
    return result


class _Bench:
    """Both models, the router, and how a piece is measured."""

    def __init__(self) -> None:
        self.loaded = load(MODEL)
        self.large, self.judge = Session(self.loaded.model), Session(self.loaded.model)
        self.small = load_draft(self.loaded.model, self.large.vocab_size)
        self.router = load_router(self.small)
        self._stops = stop_ids(self.loaded.model, self.loaded.tokenizer)

    def write(self, prompt: Prompt, router: Router, threshold: float, new_tokens: int) -> RoutedGeneration:
        ids = encode_prompt(self.loaded.tokenizer, prompt.text)
        return RoutedDecoder(self.small, self.large, router, threshold).generate(ids, new_tokens, self._stops)

    def piece(self, prompt: Prompt, router: Router, threshold: float, new_tokens: int) -> dict[str, Any]:
        """One generation: its tokens, and its counts (see `Found`)."""
        made = self.write(prompt, router, threshold, new_tokens)
        counts = {"routed": made.large_passes, "read": made.large_tokens_read}
        return self._judged(prompt, made.token_ids, made.seconds, counts)

    def large_alone(self, prompt: Prompt, new_tokens: int) -> dict[str, Any]:
        """The same for the large model without a small one beside it, which would cost it time."""
        ids = encode_prompt(self.loaded.tokenizer, prompt.text)
        made = SpeculativeDecoder(self.large).generate(ids, new_tokens, self._stops)
        counts = {"routed": len(made.token_ids), "read": len(ids) + len(made.token_ids) - 1}
        return self._judged(prompt, made.token_ids, made.seconds, counts)

    def _judged(
        self, prompt: Prompt, token_ids: list[int], seconds: float, counts: dict[str, int]
    ) -> dict[str, Any]:
        ids = encode_prompt(self.loaded.tokenizer, prompt.text)
        nats = -float(log_probs(self.judge, ids + token_ids)[len(ids) - 1 :].sum())
        measured = {"nats": nats, "words": len(token_ids), "seconds": seconds}
        return {"token_ids": token_ids, "counts": counts | measured}

    def thresholds(self, lessons: Sequence[Prompt], new_tokens: int) -> dict[str, dict[str, float]]:
        """For each point the learned router's threshold and its share on the calibration prompts, which is the
        random router's rate; and the entropy router's threshold for the same share."""

        def share(router: Router, threshold: float) -> tuple[float, list[float]]:
            made = [self.write(prompt, router, threshold, new_tokens) for prompt in lessons]
            scores = [score for each in made for score in each.scores]
            return sum(score >= threshold for score in scores) / len(scores), scores

        def seek(router: Router, target: float, threshold: float) -> float:
            for _ in range(ROUNDS):
                wanted = float(np.quantile(share(router, threshold)[1], 1 - target))
                threshold = (threshold + wanted) / 2
            return threshold

        found = {}
        for point, target in zip(POINTS, (None, *TARGETS), strict=True):
            own = self.router.threshold if target is None else seek(self.router, target, 0.5)
            rate = share(self.router, own)[0]
            found[point] = {"R2R": own, "random": rate, "entropy": seek(EntropyRouter(), rate, 2.0)}
        return found


def _ways(router: Router, thresholds: dict[str, dict[str, float]], seeds: int) -> dict[str, tuple[Router, float]]:
    """All that is run, by name, but the large model alone: a router and its threshold."""
    ways: dict[str, tuple[Router, float]] = {"small": (RandomRouter(0.0), 1.0)}
    for point, at in thresholds.items():
        ways[f"R2R {point}"] = (router, at["R2R"])
        ways[f"entropy {point}"] = (EntropyRouter(), at["entropy"])
        for seed in range(seeds):
            chance = RandomRouter(at["random"], seed)
            ways[f"random {point} #{seed}"] = (chance, chance.threshold)
    return ways


def _figures(found: Found) -> list[Figure]:
    everything = np.arange(found.prompts)

    def value(statistic: Statistic) -> float:
        return statistic(everything)

    def few(_: Indices) -> float:
        return FEW

    def likelihood(name: str) -> Statistic:
        nats = found.nats(name)
        return lambda items: -nats(items)

    # Thresholds are the dossier's, fixed before anything was run: 70% of the gap with a quarter of the tokens, and
    # above the curves of entropy and chance. A router that knows nothing recovers about its share.
    figures = [
        figure(
            f"Gap between both models recovered with {FEW:.0%} large-model tokens", "share",
            found.interval(found.along("R2R", few, found.recovered)), 0.7, FEW,
            ours=value(found.along("R2R", few, found.nats)), baseline=value(found.nats("small")),
            baseline_name="the small model alone, nats a token",
            paper="1.5B with 13% of a 32B: as accurate as 14B", headline=True,
        ),
        figure(
            "Gap between both models recovered, the router's own threshold", "share",
            found.interval(found.recovered("R2R own")), 0.7, FEW,
            ours=value(found.nats("R2R own")), baseline=value(found.nats("small")),
            baseline_name="the small model alone, nats a token",
        ),
    ]  # fmt: skip
    for kind in RIVALS:
        for name, quality, unit, headline in (
            ("Likelier text than", likelihood, "nats a token", True),
            ("Nearer to the large model's answer than", found.overlap, "ROUGE-L", False),
        ):
            rival = float(np.mean([value(found.rival(kind, point, quality)) for point in POINTS]))
            ours = float(np.mean([value(quality(f"R2R {point}")) for point in POINTS]))
            figures.append(
                figure(f"{name} the {kind} router at equal shares, mean of {len(POINTS)}", unit,
                       found.ahead(kind, quality), 0.0, 0.0, ours=ours, baseline=rival, baseline_name=kind,
                       paper="ahead of both", headline=headline)
            )  # fmt: skip
    for point in POINTS:
        name = f"R2R {point}"
        figures.append(
            figure(f"Speed of {name} against the large model alone", "ratio", found.speed(name), 1.0, 1.0,
                   ours=value(found.ratio(name, "words", "seconds")),
                   baseline=value(found.ratio("large", "words", "seconds")),
                   baseline_name="the large model alone, tokens/s", paper="2.8 times R1-32B")
        )  # fmt: skip
    return figures


def _table(found: Found, bench: _Bench) -> list[dict[str, Any]]:
    weigh = RoutedDecoder(bench.small, bench.large, bench.router).generate([0], 1).weights
    rows = []
    for name in ("small", "large", *(f"{kind} {point}" for point in POINTS for kind in ("R2R", *RIVALS))):
        share = found.interval(found.share(name)).value
        router = weigh.router if name.startswith("R2R") else 0
        rows.append(
            {
                "way": name,
                "large-model tokens": round(share, 3),
                "activated parameters, millions": round(
                    (weigh.large if name == "large" else weigh.small + router + share * weigh.large) / 1e6, 1
                ),
                "nats a token": str(found.interval(found.nats(name))),
                "gap recovered": str(found.interval(found.recovered(name))),
                "ROUGE-L": str(found.interval(found.overlap(name))),
                "distinct pairs": round(found.interval(found.ratio(name, "distinct", "pairs")).value, 3),
                "large model reads a token": round(found.interval(found.ratio(name, "read", "words")).value, 2),
                "times large": str(found.speed(name)) if name != "large" else "1",
            }
        )
    return rows


def _series(found: Found) -> list[dict[str, Any]]:
    plots = []
    for title, label, quality in (
        ("What a router buys for the large model's tokens", "nats a token, less is better", found.nats),
        ("How near the text is to the large model's own", "ROUGE-L of tokens", found.overlap),
    ):
        lines = []
        for kind in ("R2R", *RIVALS):
            at = sorted(
                (found.interval(found.share(name)).value, name)
                for name in ("small", *(f"{kind} {point}" for point in POINTS), "large")
            )
            lines.append(line(kind, [x for x, _ in at], [found.interval(quality(name)) for _, name in at]))
        plots.append({"title": title, "x_label": "share of large-model tokens", "y_label": label, "lines": lines})
    return plots
