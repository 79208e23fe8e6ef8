"""Decoders side by side on this machine: one model, the same prompts, batch 1, in one run, with their peers.

    python benchmarks/decode.py [PROMPTS] [TOKENS] [TEMPERATURE]     # 24 prompts, 64 new tokens, greedy by default

Prints tokens per second, tokens a pass, and speed against `model.generate` and against plain decoding in a
Session, with 95% intervals over prompts. The published tree warms the matrix on the calibration prompts.

Peers, greedy only: `model.generate`, its assisted generation with the draft model of tokenworks (given the whole
vocabulary, which it asks for), its prompt lookup, and llama.cpp on the GGUF file that the model came from, in the
file's own 4 bits (`pip install 'tokenworks[peers]'`; left out, and said so, where it is missing).
"""

from __future__ import annotations

import copy
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
from tokenworks.core.models import LoadedModel, load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode import SpeculativeDecoder, TokenRecycling, decoder
from tokenworks.decode.distil import load_draft

Output = tuple[list[int], int]
Decode = Callable[[list[int]], Output]

AIMS = {
    0.0: {("plain", "generate"): 1.2, ("token-recycling", "plain"): 1.5, ("best", "plain"): 2.0},
    1.0: {("best", "plain"): 1.5},
}
"""The ratios that the project set out to reach, by temperature."""

GREEDY = ("token-recycling", "prompt-tokens", "dyspec-best", "dyspec-threshold", "rsd-s")
SAMPLED = ("token-recycling", "prompt-tokens", "draft-chain", "independent-drafts", "rsd-c", "rsd-s",
           "dyspec", "dyspec-threshold")  # fmt: skip


def main(count: int = 24, new_tokens: int = 64, temperature: float = 0.0) -> None:
    loaded = load("smollm2-135m")
    sampling, stops = Sampling(temperature), stop_ids(loaded.model, loaded.tokenizer)
    calibration, chosen = (
        [encode_prompt(loaded.tokenizer, p.text) for p in found]
        for found in (prompts(split="calibration"), prompts(split="test", limit=count))
    )
    ours: dict[str, SpeculativeDecoder] = {"plain": SpeculativeDecoder(Session(loaded.model), sampling=sampling)}
    for name in GREEDY if sampling.greedy else SAMPLED:
        ours[name] = decoder(Session(loaded.model), sampling=sampling, draft=name)
    warm(ours["token-recycling"], calibration, new_tokens, stops)

    def run(decode: SpeculativeDecoder, ids: list[int]) -> Output:
        found = decode.generate(ids, new_tokens, stops, seed=len(ids))
        return found.token_ids, found.target_passes

    runs: dict[str, Decode] = {name: partial(run, decode) for name, decode in ours.items()}
    if sampling.greedy:
        runs = {**transformers_peers(loaded, new_tokens, stops), **llama_cpp(loaded, new_tokens, stops), **runs}
    timed = paired(runs, chosen, warmup=0)
    work = {name: [float(len(ids)) for ids, _ in timed.outputs[name]] for name in runs}

    table = Table(
        title=f"smollm2-135m, {count} prompts, {new_tokens} new tokens, temperature {temperature}, batch 1"
    )
    for heading in ("decoder", "tokens/s", "tokens a pass", "times generate", "times plain", "words of plain"):
        table.add_column(heading)
    for name in runs:
        tokens, passes = sum(work[name]), sum(count for _, count in timed.outputs[name])
        pairs = zip(timed.outputs[name], timed.outputs["plain"], strict=True)
        same = sum(mine[0] == other[0] for mine, other in pairs)
        table.add_row(
            name,
            f"{tokens / sum(timed.median_seconds(name)):.1f}",
            f"{tokens / passes:.2f}" if passes else "",
            str(timed.ratio(name, "generate", work)) if "generate" in runs else "",
            str(timed.ratio(name, "plain", work)),
            f"{same} of {len(chosen)}" if sampling.greedy else "",
        )
    console = Console()
    console.print(table)
    speed = {name: sum(work[name]) / sum(timed.median_seconds(name)) for name in ours}
    best = max((name for name in ours if name != "plain"), key=lambda name: speed[name])
    for (name, baseline), aim in AIMS.get(temperature, {}).items():
        found = timed.ratio(best if name == "best" else name, baseline, work)
        reached = "reached" if found.value >= aim else "not reached"
        console.print(
            f"{name} ({best if name == 'best' else name}) against {baseline}: {found}, aim {aim}: {reached}"
        )
    if not sampling.greedy or "llama.cpp" not in runs:
        console.print("llama.cpp: not measured" + ("" if sampling.greedy else " when sampling"))
    console.print(", ".join(f"{key} {value}" for key, value in machine_facts().items()))


def warm(recycling: SpeculativeDecoder, calibration: list[list[int]], new_tokens: int, stops: list[int]) -> None:
    """The published tree teaches a matrix eighty rows a pass, the small tree that is fast here only a few."""
    assert isinstance(recycling.drafter, TokenRecycling)
    teacher = TokenRecycling(recycling.session.vocab_size)
    teacher.matrix = recycling.drafter.matrix
    warming = SpeculativeDecoder(recycling.session, teacher)
    for ids in track(calibration, "warming the matrix"):
        warming.generate(ids, new_tokens, stops)


def transformers_peers(loaded: LoadedModel, new_tokens: int, stops: list[int]) -> dict[str, Decode]:
    """What Transformers has for lossless decoding."""
    model: Any = loaded.model
    assistant = copy.deepcopy(load_draft(model, model.config.vocab_size).session.model)  # type: ignore[attr-defined]
    assistant.set_output_embeddings(model.get_output_embeddings())

    def theirs(ids: list[int], **options: Any) -> Output:
        passes: list[None] = []
        hook = model.register_forward_hook(lambda *_: passes.append(None))
        limits = {"max_new_tokens": new_tokens, "eos_token_id": stops, "pad_token_id": stops[0]}
        output = model.generate(torch.tensor([ids]), do_sample=False, **limits, **options)
        hook.remove()
        return output[0, len(ids) :].tolist(), len(passes)

    return {
        "generate": theirs,
        "assisted generation": partial(theirs, assistant_model=assistant),
        "prompt lookup": partial(theirs, prompt_lookup_num_tokens=10),
    }


def llama_cpp(loaded: LoadedModel, new_tokens: int, stops: list[int]) -> dict[str, Decode]:
    """llama.cpp on the same GGUF file; nothing where it is not installed."""
    try:
        from xllamacpp import CommonParams, Server
    except ImportError:
        return {}
    settings = CommonParams()
    settings.model.path = str(loaded.gguf_path)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 2048, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = Server(settings)

    def theirs(ids: list[int]) -> Output:
        request = {"prompt": ids, "max_tokens": new_tokens, "temperature": 0.0, "cache_prompt": False}
        (made,) = server.handle_completions(request)["choices"]
        ended = [stops[0]] if made["finish_reason"] == "stop" else []
        return loaded.tokenizer(made["text"])["input_ids"] + ended, 0

    return {"llama.cpp": theirs}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *map(float, sys.argv[3:4]))
