"""SpecTr (arXiv 2310.15141): do more drafts, selected by optimal transport, confirm more tokens a pass?

The paper reports 2.13 times the speed of plain decoding and 1.37 times that of speculative sampling (PaLM-2,
eight drafts of eight tokens, on accelerators where a pass over 64 slots costs no more than one over 8). The
claim that can be judged on any machine is block efficiency, tokens for each pass of the target, against the
number of drafts at a fixed length; and that K-SEQ comes close to the best selection there is. The latter is
measured on the distributions of both models at places of the target's own text, without any generation.
Everything is sampled at temperature 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenworks.core.data import prompts
from tokenworks.core.measure import mean_interval, ratio_of_sums
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt
from tokenworks.decode.distil import load_draft
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.rsd import RecursiveRejection
from tokenworks.decode.spectr import IndependentDrafts, KSequential, acceptance, optimal_acceptance
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.reproduce import Run
from tokenworks.reproduce.drafting import Comparison, compare
from tokenworks.reproduce.judge import read_logits
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, figure, line

MODEL = "smollm2-135m"
LENGTH = 3
DRAFTS = (1, 2, 4, 8)
CANDIDATES = (1, 2, 4, 8, 16)
SAMPLED = Sampling(temperature=1.0)


def run(settings: Run) -> Result:
    """Measure, in about six minutes a seed on two CPU cores; `quick` takes one."""
    begun = time.perf_counter()
    count, new_tokens = (4, 16) if settings.quick else (18, 64)
    loaded = load(MODEL)
    session = Session(loaded.model)
    draft = load_draft(loaded.model, session.vocab_size)
    decoders = {
        "plain": SpeculativeDecoder(session, sampling=SAMPLED),
        **{
            f"SpecTr {k}x{LENGTH}": SpeculativeDecoder(
                session, IndependentDrafts(draft, k, LENGTH), KSequential(), SAMPLED
            )
            for k in DRAFTS
        },
        f"SpecInfer 8x{LENGTH}": SpeculativeDecoder(
            session, IndependentDrafts(draft, 8, LENGTH), RecursiveRejection(replacement=True), SAMPLED
        ),
    }
    chosen = prompts(split="test", limit=count)
    facts = {"prompts": [p.id for p in chosen], "max_new_tokens": new_tokens, "draft_length": LENGTH}
    ledger = Ledger(settings.folder / "unfinished" / "spectr", {**facts, "torch": torch.__version__})
    found = compare(settings, loaded, decoders, chosen, new_tokens, ledger)
    shares: list[dict[str, Any]] = []
    for prompt in chosen:
        settings.progress(len(shares), count, f"acceptance at places of {prompt.id}")
        ids = encode_prompt(loaded.tokenizer, prompt.text)
        text = found.texts["plain"][prompt.id]
        shares.append(ledger.once(f"pairs/{prompt.id}", lambda: _acceptances(session, draft, ids, text)))  # noqa: B023
    result = Result(
        slug="spectr",
        claim="",
        figures=_figures(found, shares),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={**facts, "sampling": "temperature 1", "batch": 1, "dtype": str(loaded.model.dtype)},
        table=found.rows("plain"),
        series=_series(found, shares),
        notes=[
            "Each further draft costs slots in the target's pass, which are not free on a CPU: speed is given, "
            "and the claim judged by block efficiency.",
        ],
    )
    ledger.close()
    return result


def pairs(session: Session, draft: DraftModel, prompt: Sequence[int], text: Sequence[int]) -> Iterator[Tensor]:
    """At each place of `text` the draft's and the target's distribution of the next token: float64 [2, V]."""
    draft.start(prompt, SAMPLED, None)
    both = (read_logits(engine, [*prompt, *text])[len(prompt) - 1 : -1] for engine in (session, draft.session))
    for q_logits, p_logits in zip(*both, strict=True):
        p = torch.zeros(session.vocab_size, dtype=torch.float64)
        p[draft.vocabulary] = draft.distribution(p_logits[: len(draft.vocabulary)]).double()
        yield torch.stack([p, SAMPLED.distribution(q_logits).double()])


def _acceptances(session: Session, draft: DraftModel, prompt: Sequence[int], text: Sequence[int]) -> Any:
    """For each number of candidates, over all places: the sums of K-SEQ's acceptance and of the best there is."""
    sums = {str(k): [0.0, 0.0] for k in CANDIDATES}
    for p, q in pairs(session, draft, prompt, text):
        for k in CANDIDATES:
            sums[str(k)][0] += acceptance(p, q, k)
            sums[str(k)][1] += optimal_acceptance(p, q, k)
    return {"places": len(text), "sums": sums}


def _figures(found: Comparison, shares: list[dict[str, Any]]) -> list[Figure]:
    most, one = f"SpecTr 8x{LENGTH}", f"SpecTr 1x{LENGTH}"
    efficiency = {name: found.efficiency(name).value for name in found.counts}
    speed = {name: found.tokens_per_second(name) for name in found.counts}
    nats = {name: found.nats(name).value for name in found.counts}
    best = ratio_of_sums([s["sums"]["8"][0] for s in shares], [s["sums"]["8"][1] for s in shares])
    # Thresholds are the dossier's, fixed before anything was run.
    return [
        figure("Block efficiency of 8 drafts against 1", "ratio", found.gain(most, one), 1.1, 1.0,
               ours=efficiency[most], baseline=efficiency[one], baseline_name="speculative sampling",
               paper="implied by 1.37 times the speed, at another length", headline=True),
        figure("Acceptance of K-SEQ by the optimum, 8 candidates", "ratio", best, 0.9, 1 - 1 / 2.718281828,
               ours=best.value, baseline=1.0, baseline_name="optimal transport", paper="at least 0.63",
               headline=True),
        figure("Block efficiency against multi-step selection", "ratio",
               found.gain(most, f"SpecInfer 8x{LENGTH}"), 1.0, 1.0, ours=efficiency[most],
               baseline=efficiency[f"SpecInfer 8x{LENGTH}"], baseline_name="SpecInfer, the same drafts"),
        figure("Nats a token, plain by SpecTr", "ratio", found.likelier(most, "plain"), 0.9, 0.9,
               ours=nats[most], baseline=nats["plain"], baseline_name="plain decoding", paper="no change"),
        figure("Speed against speculative sampling", "times", found.speed(most, one), 1.0, 1.0,
               ours=speed[most], baseline=speed[one], baseline_name="speculative sampling",
               paper="1.37"),
        figure("Speed against plain decoding", "times", found.speed(most, "plain"), 1.0, 1.0,
               ours=speed[most], baseline=speed["plain"], baseline_name="plain decoding", paper="2.13"),
    ]  # fmt: skip


def _series(found: Comparison, shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    drafts = [found.efficiency(f"SpecTr {k}x{LENGTH}") for k in DRAFTS]
    lines = []
    for place, name in enumerate(("K-SEQ", "optimal transport")):
        means = [
            mean_interval([s["sums"][str(k)][place] / s["places"] for s in shares if s["places"]])
            for k in CANDIDATES
        ]
        lines.append(line(name, CANDIDATES, means))
    return [
        {
            "title": f"Tokens a pass against the number of drafts of {LENGTH} tokens",
            "x_label": "drafts",
            "y_label": "block efficiency",
            "lines": [line("SpecTr", DRAFTS, drafts)],
        },
        {
            "title": "Probability that one of k candidates is accepted",
            "x_label": "candidates",
            "y_label": "acceptance",
            "lines": lines,
        },
    ]
