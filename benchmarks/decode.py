"""Decoders side by side on this machine: one model, the same prompts, batch 1, greedy, in one run.

    python benchmarks/decode.py [PROMPTS] [TOKENS]     # 24 prompts over six kinds and 64 new tokens by default

Prints tokens per second, tokens a pass, and speed against `model.generate` and against plain decoding in a
Session, with 95% intervals over prompts. The published tree warms the matrix on the calibration prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenworks.core.data import prompts
from tokenworks.core.measure import machine_facts, paired
from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode import SpeculativeDecoder, TokenRecycling, decoder

TARGETS = {("plain", "generate"): 1.2, ("token-recycling", "plain"): 1.5, ("token-recycling", "generate"): 2.2}
"""The ratios that the project set out to reach."""


def main(count: int = 24, new_tokens: int = 64) -> None:
    loaded = load("smollm2-135m")
    session, stops = Session(loaded.model), stop_ids(loaded.model, loaded.tokenizer)
    plain, recycling = SpeculativeDecoder(session), decoder(session, "token-recycling")
    calibration, chosen = (
        [encode_prompt(loaded.tokenizer, p.text) for p in found]
        for found in (prompts(split="calibration"), prompts(split="test", limit=count))
    )
    # The published tree teaches a matrix eighty rows a pass, the small tree that is fast here only a few.
    assert isinstance(recycling.drafter, TokenRecycling)
    teacher = TokenRecycling(session.vocab_size)
    teacher.matrix = recycling.drafter.matrix
    warming = SpeculativeDecoder(session, teacher)
    for ids in track(calibration, "warming the matrix"):
        warming.generate(ids, new_tokens, stops)

    def ours(decode: SpeculativeDecoder, ids: list[int]) -> tuple[list[int], int]:
        found = decode.generate(ids, new_tokens, stops)
        return found.token_ids, found.target_passes

    def theirs(ids: list[int], **options: Any) -> tuple[list[int], int]:
        model: Any = loaded.model
        passes: list[None] = []
        hook = model.register_forward_hook(lambda *_: passes.append(None))
        limits = {"max_new_tokens": new_tokens, "eos_token_id": stops, "pad_token_id": stops[0]}
        output = model.generate(torch.tensor([ids]), do_sample=False, **limits, **options)
        hook.remove()
        return output[0, len(ids) :].tolist(), len(passes)

    runs: dict[str, Callable[[list[int]], tuple[list[int], int]]] = {
        "generate": theirs,
        "prompt lookup": partial(theirs, prompt_lookup_num_tokens=10),
        "plain": partial(ours, plain),
        "token-recycling": partial(ours, recycling),
    }
    timed = paired(runs, chosen, warmup=0)
    work = {name: [float(len(ids)) for ids, _ in timed.outputs[name]] for name in runs}

    table = Table(title=f"smollm2-135m, {len(chosen)} prompts, {new_tokens} new tokens, greedy, batch 1")
    for heading in ("decoder", "tokens/s", "tokens a pass", "times generate", "times plain", "words of plain"):
        table.add_column(heading)
    for name in runs:
        tokens, passes = sum(work[name]), sum(count for _, count in timed.outputs[name])
        pairs = zip(timed.outputs[name], timed.outputs["plain"], strict=True)
        same = sum(mine[0] == other[0] for mine, other in pairs)
        table.add_row(
            name,
            f"{tokens / sum(timed.median_seconds(name)):.1f}",
            f"{tokens / passes:.2f}",
            str(timed.ratio(name, "generate", work)),
            str(timed.ratio(name, "plain", work)),
            f"{same} of {len(chosen)}",
        )
    console = Console()
    console.print(table)
    console.print(f"tree of token-recycling: {recycling.drafter.template.paths}")
    for (name, baseline), aim in TARGETS.items():
        found = timed.ratio(name, baseline, work)
        reached = "reached" if found.value >= aim else "not reached"
        console.print(f"{name} against {baseline}: {found}, aim {aim}: {reached}")
    console.print(", ".join(f"{key} {value}" for key, value in machine_facts().items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
