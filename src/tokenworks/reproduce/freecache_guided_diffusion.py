"""FreeCache and Guided Diffusion (arXiv 2505.21467): fewer and cheaper steps at equal quality?

The paper reports a diffusion model of 7 or 8 billion parameters up to 34 times faster (12 times on average),
without loss, against its own sampler that writes one token a step. Here the models are the small ones that come
with tokenworks, and the tasks two:

    additions      two solved problems and a third to solve, steps written out, 32 slots; judged by exact match
    documentation  a prompt of 32, 64 or 128 tokens and 64 slots; judged by nats a character under SmolLM2

All samplers are deterministic. A seed adds problems and texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.corpus import python_docs
from tokenworks.core.measure import Interval, bootstrap, mean_interval
from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.decode.diffusion import Diffusion, generate_diffusion
from tokenworks.decode.freecache_guided_diffusion import FreeCache, generate_guided
from tokenworks.decode.masked_diffusion import BidirectionalLlama, addition, load_masked_diffusion
from tokenworks.reproduce import Run
from tokenworks.reproduce.judge import log_probs
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, figure, line

JUDGE = "smollm2-135m"
SLOTS, BLOCK, WINDOW = 32, 8, 16
PROMPTS, LONG = (32, 64, 128), 64
PLAIN, QUARTER, BLOCKS, BOTH = "one a step", "a quarter of the steps", "one a step, in blocks", "guided + sliding"
FROZEN = ("FreeCache, prompt", "FreeCache, block", "FreeCache, sliding")
GUIDED = ("guided", "guided, top-k")

Sampler = Callable[[Tensor, int], Diffusion]
Piece = dict[str, Any]


def run(settings: Run) -> Result:
    """Measure, in about six minutes a seed on two CPU cores; `quick` takes half a minute."""
    begun = time.perf_counter()
    problems, texts = (6, 2) if settings.quick else (100, 10)
    model, guide, tokenizer = load_masked_diffusion()
    loaded = load(JUDGE)
    judge = Session(loaded.model)
    ways = samplers(model, Session(guide))
    facts = {
        "problems": problems,
        "texts": texts,
        "slots": SLOTS,
        "block": BLOCK,
        "window": WINDOW,
        "prompts": PROMPTS,
        "long": LONG,
    }
    ledger = Ledger(
        settings.folder / "unfinished" / "freecache-guided-diffusion", {**facts, "torch": torch.__version__}
    )
    total = settings.seeds * (problems + texts * len(PROMPTS))
    solved: list[dict[str, Piece]] = []
    for number in range(settings.seeds * problems):
        settings.progress(len(solved), total, f"problem {number}")
        solved.append(ledger.once(f"problem/{number}", lambda: _solve(ways, tokenizer, number)))  # noqa: B023
    stream = torch.tensor([t for text in python_docs("test") for t in tokenizer(text)["input_ids"]])
    written: dict[int, list[dict[str, Piece]]] = {length: [] for length in PROMPTS}
    for number in range(settings.seeds * texts * len(PROMPTS)):
        length, text = PROMPTS[number % len(PROMPTS)], number // len(PROMPTS)
        settings.progress(len(solved) + number, total, f"text {text}, prompt of {length} tokens")

        def write(length: int = length, text: int = text) -> dict[str, Piece]:
            chance = torch.Generator().manual_seed(text)
            first = int(torch.randint(len(stream) - max(PROMPTS), (1,), generator=chance))
            prompt = stream[first + max(PROMPTS) - length : first + max(PROMPTS)]
            found = _all(ways, prompt, LONG, turn=text)
            for piece in found.values():
                before, new = (str(tokenizer.decode(ids)) for ids in (prompt, piece["token_ids"]))
                piece["nats"] = nats_after(judge, loaded.tokenizer, before, new)
            return found

        written[length].append(ledger.once(f"text/{text}/{length}", write))
    trace = ways[BOTH](question(tokenizer, 0), SLOTS).trace(tokenizer)
    trace.meta["title"] = "Guided diffusion with FreeCache: an addition"
    settings.progress(total, total, "done")
    result = Result(
        slug="freecache-guided-diffusion",
        claim="",
        figures=_figures(solved, written),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model="masked-diffusion (comes with tokenworks)",
        settings={**facts, "sampling": "first choices", "judge": JUDGE},
        table=_table(solved, written),
        series=_series(written),
        traces=[trace.to_dict()],
        notes=[
            "The models have 3.9 and 1.4 million parameters: a pass of the guide costs nearly as much as one of "
            "the model, where the paper's guide is five times as small, and Python's own time counts.",
        ],
    )
    ledger.close()
    return result


def samplers(model: BidirectionalLlama, guide: Session) -> dict[str, Sampler]:
    """Every way of writing, from a prompt [P] and a number of slots."""
    free = FreeCache(model, "none")
    found: dict[str, Sampler] = {
        PLAIN: lambda prompt, slots: generate_diffusion(free, prompt, slots),
        QUARTER: lambda prompt, slots: generate_diffusion(free, prompt, slots, slots // 4),
        BLOCKS: lambda prompt, slots: generate_diffusion(free, prompt, slots, block=BLOCK),
    }
    for name in FROZEN:
        cache = FreeCache(model, name.split()[-1], BLOCK, WINDOW)  # type: ignore[arg-type]
        found[name] = lambda prompt, slots, cache=cache: generate_diffusion(cache, prompt, slots, block=BLOCK)  # type: ignore[misc]
    found["guided"] = lambda prompt, slots: generate_guided(free, guide, prompt, slots)
    found["guided, top-k"] = lambda prompt, slots: generate_guided(free, guide, prompt, slots, "topk-relative")
    sliding = FreeCache(model, "sliding", window=WINDOW)
    found[BOTH] = lambda prompt, slots: generate_guided(sliding, guide, prompt, slots)
    return found


def question(tokenizer: PreTrainedTokenizerBase, number: int) -> Tensor:
    """Test problem `number` behind two that are solved: token ids."""
    first, second, third = (addition(3 * number + place) for place in range(3))
    return torch.tensor(tokenizer("".join((*first, *second, third[0])))["input_ids"])


def _solve(ways: dict[str, Sampler], tokenizer: PreTrainedTokenizerBase, number: int) -> dict[str, Piece]:
    found = _all(ways, question(tokenizer, number), SLOTS, turn=number)
    answer = addition(3 * number + 2)[1]
    for piece in found.values():
        piece["right"] = float(str(tokenizer.decode(piece["token_ids"])).startswith(answer))
    return found


def _all(ways: dict[str, Sampler], prompt: Tensor, slots: int, turn: int) -> dict[str, Piece]:
    found = {}
    for place in range(len(ways)):
        name = list(ways)[(place + turn) % len(ways)]
        made = ways[name](prompt, slots)
        found[name] = {
            "token_ids": made.token_ids,
            "steps": made.steps,
            "fed": made.tokens_fed,
            "guide": made.guide_calls,
            "seconds": made.seconds,
        }
    return found


def nats_after(judge: Session, tokenizer: PreTrainedTokenizerBase, before: str, new: str) -> float:
    """Nats a character of `new` behind `before`, under another model; 0 for no text."""
    known, ids = tokenizer(before)["input_ids"], tokenizer(new)["input_ids"]
    if not ids:
        return 0.0
    return -float(log_probs(judge, [*known, *ids])[len(known) - 1 :].sum()) / len(new)


def _column(pieces: list[dict[str, Piece]], name: str, what: str) -> np.ndarray:
    return np.array([piece[name][what] for piece in pieces], dtype=float)


def _faster(pieces: list[dict[str, Piece]], name: str, baseline: str) -> Interval:
    ours, theirs = _column(pieces, name, "seconds"), _column(pieces, baseline, "seconds")
    return bootstrap(lambda items: float(theirs[items].sum() / ours[items].sum()), len(pieces))


def _figures(solved: list[dict[str, Piece]], written: dict[int, list[dict[str, Piece]]]) -> list[Figure]:
    right = {name: _column(solved, name, "right") for name in solved[0]}
    seconds = {name: _column(solved, name, "seconds").mean() for name in solved[0]}
    steps = {name: _column(solved, name, "steps").mean() for name in solved[0]}
    kept = mean_interval([float(s["FreeCache, sliding"]["token_ids"] == s[BLOCKS]["token_ids"]) for s in solved])
    short, long = (written[length] for length in (min(PROMPTS), max(PROMPTS)))
    growth = bootstrap(
        lambda items: float(
            np.prod([
                _column(part, name, "seconds")[items].sum() ** power
                for part, sign in ((long, 1), (short, -1))
                for name, power in ((PLAIN, sign), (BOTH, -sign))
            ])
        ),
        len(long),
    )  # fmt: skip
    nats = {name: np.mean([_column(part, name, "nats").mean() for part in written.values()]) for name in solved[0]}
    gap = mean_interval(
        np.concatenate([_column(p, PLAIN, "nats") - _column(p, BOTH, "nats") for p in written.values()])
    )

    def accuracy(
        name: str, baseline: str, confirm_at: float, refute_below: float, label: str, paper: str
    ) -> Figure:
        return figure(label, "share of answers", mean_interval(right[name] - right[baseline]), confirm_at,
                      refute_below, ours=right[name].mean(), baseline=right[baseline].mean(),
                      baseline_name=baseline, paper=paper, headline=True)  # fmt: skip

    forwards = f"the guide ({steps['guided']:.1f} steps) over {steps[QUARTER]:.0f} steps"
    # Thresholds are the dossier's, fixed before anything was run.
    return [
        figure("Speed of guided diffusion with FreeCache, additions", "times", _faster(solved, BOTH, PLAIN),
               4.0, 1.0, ours=1 / seconds[BOTH], baseline=1 / seconds[PLAIN], baseline_name=PLAIN,
               paper="up to 34, 12 on average", headline=True),
        accuracy(BOTH, PLAIN, -0.02, -0.1, "Exact match gained by both", "no loss"),
        accuracy("guided", QUARTER, 0.0, -0.02, f"Exact match gained by {forwards}", ""),
        figure("Answers that FreeCache (sliding) leaves as they are", "share", kept, 0.95, 0.9, ours=kept.value,
               baseline=1.0, baseline_name=BLOCKS, paper="negligible loss"),
        figure(f"Growth of the speed-up from prompts of {min(PROMPTS)} to {max(PROMPTS)} tokens", "times", growth,
               1.0, 1.0, ours=_faster(long, BOTH, PLAIN).value, baseline=_faster(short, BOTH, PLAIN).value,
               baseline_name="the short prompt", paper="longest prompts gain most"),
        figure("Documentation likelier by, with both", "nats a character", gap, -0.05, -0.2,
               ours=float(nats[BOTH]), baseline=float(nats[PLAIN]), baseline_name=PLAIN, paper="no loss"),
    ]  # fmt: skip


def _table(solved: list[dict[str, Piece]], written: dict[int, list[dict[str, Piece]]]) -> list[dict[str, Any]]:
    rows = []
    for name in solved[0]:
        rows.append(
            {
                "sampler": name,
                "exact match": f"{_column(solved, name, 'right').mean():.1%}",
                "steps": round(_column(solved, name, "steps").mean(), 1),
                "positions run": round(_column(solved, name, "fed").mean()),
                "passes of the guide": round(_column(solved, name, "guide").mean(), 1),
                "speed, additions": round(_faster(solved, name, PLAIN).value, 2),
                "speed, documentation": round(_faster(written[max(PROMPTS)], name, PLAIN).value, 2),
                "nats a character": round(float(np.mean([_column(p, name, "nats") for p in written.values()])), 3),
            }
        )
    return rows


def _series(written: dict[int, list[dict[str, Piece]]]) -> list[dict[str, Any]]:
    lines = []
    for name in (QUARTER, "FreeCache, sliding", "guided", BOTH):
        speeds = [_faster(part, name, PLAIN) for part in written.values()]
        lines.append(line(name, written, speeds))
    return [
        {
            "title": f"Speed against one token a step, {LONG} slots",
            "x_label": "tokens of the prompt",
            "y_label": "times as fast",
            "lines": lines,
        }
    ]
