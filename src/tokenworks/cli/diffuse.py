"""`tokenworks diffuse`: continue a prompt with a masked-diffusion model, with FreeCache and a guide."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokenworks.cli.traces import check_trace_out, show_trace
from tokenworks.core.errors import InputError


def diffuse(
    prompt: Annotated[str, typer.Argument(help="What to continue; '-' reads it from standard input.")],
    length: Annotated[int, typer.Option("--length", "-n", help="Tokens to write, all in one go.")] = 32,
    cache: Annotated[
        str, typer.Option("--cache", help="FreeCache: none, prompt, block, aggressive or sliding.")
    ] = "sliding",
    window: Annotated[
        int, typer.Option("--window", help="Clean tokens that --cache sliding goes on running.")
    ] = 32,
    guide: Annotated[
        bool, typer.Option("--guide/--no-guide", help="Let a causal model say how far to go.")
    ] = True,
    rule: Annotated[
        str, typer.Option("--rule", help="deterministic, topk-relative, topk, threshold or sampled.")
    ] = "deterministic",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Without a guide: passes in all, by default one a token.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of --rule sampled.")] = 0,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A folder that `tokenworks train masked-diffusion` wrote.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also show in which step each token was written.")
    ] = False,
    trace_out: Annotated[
        Path | None, typer.Option("--trace-out", help="Write the Trace to a .html page or a .json file.")
    ] = None,
) -> None:
    """Write text with a masked-diffusion model: many tokens a pass, and no passes over what is settled.

    The models that come with tokenworks are tiny. They add numbers in a form of their own, and imitate Python's
    documentation.

    Examples:

        tokenworks diffuse "583+764=" --trace

        tokenworks diffuse "Return the " -n 48 --no-guide --cache none --steps 12 --json
    """
    check_trace_out(trace_out)
    if guide and steps is not None:
        raise InputError("steps: the guide decides how many there are; leave it out, or pass --no-guide")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InputError("prompt: empty; write something for the model to continue")

    from tokenworks.core.session import Session
    from tokenworks.decode.diffusion import generate_diffusion
    from tokenworks.decode.freecache_guided_diffusion import FreeCache, Rule, generate_guided
    from tokenworks.decode.masked_diffusion import END_ID, load_masked_diffusion

    found, guiding, tokenizer = load_masked_diffusion(model)
    ids = list(tokenizer(text)["input_ids"])
    frozen = FreeCache(found, cache, window=window)  # type: ignore[arg-type]
    if guide:
        kind: Rule = rule  # type: ignore[assignment]  # refused there, if it is none
        result = generate_guided(frozen, Session(guiding), ids, length, kind, stop_ids=[END_ID], seed=seed)
    else:
        result = generate_diffusion(frozen, ids, length, steps)
    written = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
    if json_:
        kept = {
            "text": written,
            "token_ids": result.token_ids,
            "steps": result.steps,
            "unmasked_per_step": result.unmasked_per_step,
            "tokens_fed": result.tokens_fed,
            "guide_calls": result.guide_calls,
            "seconds": result.seconds,
            "cache": cache,
            "rule": rule if guide else None,
        }
        typer.echo(json.dumps(kept))
    else:
        typer.echo(text + written)
        typer.echo(
            f"{len(result.token_ids)} tokens in {result.steps} passes over {result.tokens_fed} positions, "
            f"{result.guide_calls} passes of the guide, {result.seconds:.2f} s",
            err=True,
        )
    if trace or trace_out:
        record = result.trace(tokenizer)
        record.meta |= {"title": text.strip()[:90], "cache": cache, "rule": rule if guide else "none"}
        show_trace(record, "step", trace, trace_out, err=json_)
