"""ASSD (arXiv 2504.20456): fewer network calls than tokens, from the same distribution?

The paper fills texts of 512 tokens of which 95% are masked, with a fine-tuned XLNet, and reports about a tenth
fewer network function evaluations (NFE) than filling one token after another, at equal quality. Here the model
is the small one that comes with tokenworks, the texts 128 tokens of documentation that it has not seen. Four
ways of filling them:

    sequential   one token a pass
    self         ASSD with the model's own drafts, k of them at a time
    bigram       ASSD with drafts from counts
    unchecked    k tokens a pass, each as if the others were not there, and no check

The first three draw from one distribution, so their texts must be equally likely under the model and under
SmolLM2; the last shows what checking is for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from tokenworks.core.corpus import pack, python_docs
from tokenworks.core.measure import Interval, bootstrap, mean_interval
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.any_subset import END_ID, LENGTH, XLNet, draft_mask, lattice_order, load_any_subset
from tokenworks.decode.assd import infill, joint_log_prob
from tokenworks.reproduce import Run
from tokenworks.reproduce.judge import log_probs
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, exact, figure, line

JUDGE = "smollm2-135m"
RATES, DRAFTED = (0.95, 0.5), (2, 5, 10)
MAIN, SEQUENTIAL, UNCHECKED = "self, k=5", "sequential", "unchecked, k=5"

Piece = dict[str, Any]


def run(settings: Run) -> Result:
    """Measure, in about eight minutes a seed on two CPU cores; `quick` takes one."""
    begun = time.perf_counter()
    count = 2 if settings.quick else 12
    model, tokenizer = load_any_subset()
    loaded = load(JUDGE)
    judge = Session(loaded.model)
    stream = pack(python_docs("test"), tokenizer, END_ID)
    facts = {"texts": count, "length": LENGTH, "rates": RATES, "k": DRAFTED}
    ledger = Ledger(settings.folder / "unfinished" / "assd", {**facts, "torch": torch.__version__})
    ways = _ways(model)
    pieces: dict[float, list[dict[str, Piece]]] = {rate: [] for rate in RATES}
    total = settings.seeds * count * len(RATES)
    for number in range(total):
        rate, text = RATES[number % len(RATES)], number // len(RATES)
        settings.progress(number, total, f"text {text}, {rate:.0%} masked")

        def fill(text: int = text, rate: float = rate) -> dict[str, Piece]:
            ids, holes = chunk(stream, text, rate)
            found = {}
            for turn in range(len(ways)):
                name = list(ways)[(turn + text) % len(ways)]
                started = time.perf_counter()
                filled, evaluations = ways[name](ids.masked_fill(holes, model.mask_token_id), text)
                seconds = time.perf_counter() - started
                positions = holes.nonzero()[:, 0].tolist()
                found[name] = {
                    "evaluations": evaluations,
                    "holes": len(positions),
                    "seconds": seconds,
                    "own nats": -joint_log_prob(model, filled, positions),
                    "judge nats": _judged(judge, loaded.tokenizer, str(tokenizer.decode(filled))),
                    "entropy": _entropy(filled),
                }
            return found

        pieces[rate].append(ledger.once(f"{text}/{rate}", fill))
    ids, holes = chunk(stream, 0, 0.5)
    trace = infill(model, ids.masked_fill(holes, model.mask_token_id), seed=0).trace(tokenizer)
    trace.meta["title"] = "ASSD: half of a text filled in"
    settings.progress(total, total, "done")
    result = Result(
        slug="assd",
        claim="",
        figures=_figures(pieces),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model="any-subset (comes with tokenworks)",
        settings={**facts, "sampling": "temperature 1", "judge": JUDGE},
        table=_table(pieces),
        series=_series(pieces),
        traces=[trace.to_dict()],
        notes=[
            f"The model has 3.8 million parameters and writes poor texts; the paper's has 110 million. Seeds add "
            f"texts: {settings.seeds * count} at each rate.",
        ],
    )
    ledger.close()
    return result


def chunk(stream: Tensor, number: int, rate: float) -> tuple[Tensor, Tensor]:
    """Text `number` of a stream [n], int64 [LENGTH], and which tokens are masked, bool [LENGTH]."""
    chance = torch.Generator().manual_seed(number)
    first = int(torch.randint(len(stream) - LENGTH, (1,), generator=chance))
    holes = torch.randperm(LENGTH, generator=chance) < round(rate * LENGTH)
    return stream[first : first + LENGTH], holes


def _ways(model: XLNet) -> dict[str, Callable[[Tensor, int], tuple[list[int], int]]]:
    def assd(draft: Any, k: int) -> Callable[[Tensor, int], tuple[list[int], int]]:
        def fill(ids: Tensor, seed: int) -> tuple[list[int], int]:
            found = infill(model, ids, k, draft, seed=seed)
            return found.token_ids, found.evaluations

        return fill

    return {
        SEQUENTIAL: assd("none", 1),
        **{f"self, k={k}": assd("self", k) for k in DRAFTED},
        **{f"bigram, k={k}": assd("bigram", k) for k in DRAFTED},
        UNCHECKED: lambda ids, seed: unchecked(model, ids, 5, seed),
    }


def unchecked(model: XLNet, tokens: Tensor, k: int, seed: int) -> tuple[list[int], int]:
    """Fill k holes a pass, each drawn as if the others were not there; returns the text and the passes."""
    ids, chance = tokens.clone(), torch.Generator().manual_seed(seed)
    rank, start = lattice_order(ids == model.mask_token_id)
    order, decided, passes = rank.argsort(), start, 0
    while decided < len(ids):
        slots = order[decided : decided + k]
        logits = model.logits(ids, draft_mask(rank, start, decided), slots)
        logits[:, model.mask_token_id] = -torch.inf
        ids[slots] = torch.multinomial(Sampling(1.0).distribution(logits), 1, generator=chance)[:, 0]
        decided, passes = decided + len(slots), passes + 1
    return ids.tolist(), passes


def _judged(judge: Session, tokenizer: Any, text: str) -> float:
    """Nats a character of a text under another model."""
    return -float(log_probs(judge, tokenizer(text)["input_ids"]).sum()) / max(1, len(text))


def _entropy(ids: list[int]) -> float:
    """Of the counts of tokens in a text, in nats."""
    _, counts = torch.tensor(ids).unique(return_counts=True)
    p = counts / counts.sum()
    return -float((p * p.log()).sum())


def _column(pieces: list[dict[str, Piece]], name: str, what: str) -> np.ndarray:
    return np.array([piece[name][what] for piece in pieces], dtype=float)


def _fewer(pieces: list[dict[str, Piece]], name: str, what: str) -> Interval:
    """`what` of the sequential way over that of another, the same texts resampled for both."""
    ours, theirs = _column(pieces, name, what), _column(pieces, SEQUENTIAL, what)
    return bootstrap(lambda items: float(theirs[items].sum() / ours[items].sum()), len(pieces))


def _figures(pieces: dict[float, list[dict[str, Piece]]]) -> list[Figure]:
    main = pieces[RATES[0]]
    calls = {
        name: _column(main, name, "evaluations").sum() / _column(main, name, "holes").sum() for name in main[0]
    }
    nats = {name: _column(main, name, "own nats") / _column(main, name, "holes") for name in main[0]}
    gap = mean_interval(nats[UNCHECKED] - nats[SEQUENTIAL])
    same = ks_2samp(nats[MAIN], nats[SEQUENTIAL]).pvalue
    quality = mean_interval(nats[SEQUENTIAL] - nats[MAIN])
    bound = float(max(_column(part, name, "evaluations").max() / _column(part, name, "holes").min()
                      for part in pieces.values() for name in (MAIN, "bigram, k=5")))  # fmt: skip
    speed = _fewer(main, MAIN, "seconds")
    seconds = {name: _column(main, name, "seconds").sum() / _column(main, name, "holes").sum() for name in main[0]}
    others = {"baseline": 1.0, "baseline_name": "one token a pass"}
    # Thresholds are the dossier's, fixed before anything was run.
    return [
        figure("Network calls of one token a pass, by those of ASSD (95% masked, k=5)", "times",
               _fewer(main, MAIN, "evaluations"), 1 / 0.95, 1 / 0.97, ours=calls[MAIN], paper="about 1.1",
               headline=True, **others),
        figure("Likelier than one token a pass by, the model's own nats a token", "nats", quality, -0.15, -0.3,
               ours=float(nats[MAIN].mean()), baseline=float(nats[SEQUENTIAL].mean()),
               baseline_name="one token a pass", paper="equal", headline=True),
        figure("Same distribution of nats a token (Kolmogorov-Smirnov)", "p", exact(same),
               0.01, 0.001, ours=same, paper="equal", headline=True),
        figure("Tokens by network calls, the worst text", "times", exact(1 / bound),
               1.0, 1.0, ours=1 / bound, paper="at least 1", headline=True, **others),
        figure("Worse without the check by", "nats a token", gap, 0.05, 0.0, ours=float(nats[UNCHECKED].mean()),
               baseline=float(nats[SEQUENTIAL].mean()), baseline_name="one token a pass"),
        figure("Network calls of one token a pass, by those with bigram drafts (k=5)", "times",
               _fewer(main, "bigram, k=5", "evaluations"), 1 / 0.95, 1 / 0.97,
               ours=calls["bigram, k=5"], **others),
        figure("Speed against one token a pass (k=5)", "times", speed, 1.0, 1.0, ours=1 / seconds[MAIN],
               baseline=1 / seconds[SEQUENTIAL], baseline_name="one token a pass", paper="faster"),
    ]  # fmt: skip


def _table(pieces: dict[float, list[dict[str, Piece]]]) -> list[dict[str, Any]]:
    rows = []
    for rate, part in pieces.items():
        for name in part[0]:
            holes = _column(part, name, "holes").sum()
            rows.append(
                {
                    "masked": f"{rate:.0%}",
                    "way": name,
                    "calls a token": round(_column(part, name, "evaluations").sum() / holes, 3),
                    "tokens/s": round(holes / _column(part, name, "seconds").sum(), 1),
                    "own nats a token": round(_column(part, name, "own nats").sum() / holes, 3),
                    "SmolLM2's nats a character": round(_column(part, name, "judge nats").mean(), 3),
                    "entropy of tokens": round(_column(part, name, "entropy").mean(), 3),
                }
            )
    return rows


def _series(pieces: dict[float, list[dict[str, Piece]]]) -> list[dict[str, Any]]:
    lines = []
    for draft in ("self", "bigram"):
        for rate, part in pieces.items():
            shares = [
                bootstrap(
                    lambda items, name=f"{draft}, k={k}", part=part: float(  # type: ignore[misc]
                        _column(part, name, "evaluations")[items].sum() / _column(part, name, "holes")[items].sum()
                    ),
                    len(part),
                )
                for k in DRAFTED
            ]
            lines.append(line(f"{draft}, {rate:.0%} masked", DRAFTED, shares))
    return [
        {
            "title": "Network calls for each token that was filled in",
            "x_label": "tokens drafted at a time",
            "y_label": "calls a token",
            "lines": lines,
        }
    ]
