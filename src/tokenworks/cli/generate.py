"""`tokenworks generate`: continue a prompt with any decoding method."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokenworks.cli.traces import check_trace_out, show_trace
from tokenworks.core.errors import InputError


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer or continue; '-' reads it from standard input.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="smollm2-135m, gemma-3-270m, a Hub id, a folder, or a .gguf file.")
    ] = "smollm2-135m",
    method: Annotated[
        str, typer.Option("--method", help="The decoder's slug; autoregressive is plain decoding.")
    ] = "token-recycling",
    draft: Annotated[
        str | None, typer.Option("--draft", help="The drafter, instead of the method's: rsd-s, dyspec, ...")
    ] = None,
    verify: Annotated[
        str | None, typer.Option("--verify", help="The verifier, instead of the drafter's: k-seq, ...")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option("--draft-model", help="Your own draft model, for drafters that need one.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Stop after this many tokens.")
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the likeliest tokens that sum to p.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the draws; no effect when greedy.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also show what was decided at each token.")] = False,
    trace_out: Annotated[
        Path | None, typer.Option("--trace-out", help="Write the Trace to a .html page or a .json file.")
    ] = None,
) -> None:
    """Generate text with your model, by any decoding method.

    The text streams as it is confirmed. Lossless methods, such as token-recycling, give the very words of plain
    decoding when greedy, and draws from the same distribution when sampling; only the speed differs.

    Examples:

        tokenworks generate "Write a haiku about rain." --trace

        tokenworks generate "def fib(n):" --raw -n 64 --method autoregressive

        tokenworks generate "Name three rivers." --draft rsd-s --verify token-matching --temperature 0.8

        tokenworks generate - --model ./my-model --temperature 0.8 --seed 7 --json < prompt.txt
    """
    check_trace_out(trace_out)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("prompt: empty; write something for the model to answer or continue")

    # PyTorch takes seconds to import, and `--help` and a mistyped option should not wait for it.
    from transformers import TextStreamer

    from tokenworks.core.models import load
    from tokenworks.core.sampling import Sampling
    from tokenworks.core.session import Session
    from tokenworks.core.text import encode_prompt, stop_ids
    from tokenworks.decode import check_names, decoder, open_draft

    check_names(method, draft, verify)
    sampling = Sampling(temperature, top_k, top_p)
    loaded = load(model)
    ids = encode_prompt(loaded.tokenizer, text, raw)
    session = Session(loaded.model)
    drafts = None if draft_model is None else open_draft(session, loaded.tokenizer, draft_model)
    decode = decoder(session, method, sampling, draft=draft, verify=verify, draft_model=drafts)
    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)

    def stream(new: list[int]) -> None:
        for token in new:
            streamer.put(_one(token))

    stops = stop_ids(loaded.model, loaded.tokenizer)
    result = decode.generate(ids, max_new_tokens, stops, seed, on_tokens=None if json_ else stream)
    if json_:
        kept = {
            "text": loaded.tokenizer.decode(result.token_ids, skip_special_tokens=True),
            "token_ids": result.token_ids,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "target_passes": result.target_passes,
            "method": method,
            "draft": decode.drafter.name,
            "verify": decode.verifier.name,
            "model": model,
            "seed": seed,
            "finish_reason": result.finish_reason,
        }
        typer.echo(json.dumps(kept))
    else:
        streamer.end()
        typer.echo(
            f"{len(result.token_ids)} tokens in {result.target_passes} passes of the model, "
            f"{result.tokens_per_second:.1f} tokens/s "
            f"({decode.drafter.name} + {decode.verifier.name}, {result.finish_reason})",
            err=True,
        )
    if trace or trace_out:
        found = result.trace(loaded.tokenizer)
        found.meta |= {"title": text.strip()[:90], "method": method, "model": model, "seed": seed}
        show_trace(found, "source", trace, trace_out, err=json_)


def _one(token: int):  # type: ignore[no-untyped-def]  # torch is imported late, see above
    import torch

    return torch.tensor([token])
