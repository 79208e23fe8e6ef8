"""`tokenworks generate`: continue a prompt with any decoding method."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokenworks.cli import ways
from tokenworks.cli.traces import check_trace_out, show_trace
from tokenworks.cli.ways import Task, Wanted
from tokenworks.core.errors import InputError


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer or continue; '-' reads it from standard input.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="smollm2-135m, gemma-3-270m, a Hub id, a folder, or a .gguf file.")
    ] = "smollm2-135m",
    method: Annotated[
        str | None,
        typer.Option("--method", help="The decoder's slug, token-recycling; autoregressive is plain decoding."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option("--draft", help="The drafter, instead of the method's: rsd-s, dyspec, ...")
    ] = None,
    verify: Annotated[
        str | None, typer.Option("--verify", help="The verifier, instead of the drafter's: k-seq, ...")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option("--draft-model", help="Your own draft model, for drafters that need one.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="Write only what this regular expression matches (AWRS).")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="Write only JSON that the schema in this file accepts.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="Write only what the grammar in this file, Lark's, produces.")
    ] = None,
    particles: Annotated[
        int | None, typer.Option("--particles", help="Texts that a constraint weighs, 5; 1 at temperature 0.")
    ] = None,
    route: Annotated[
        bool, typer.Option("--route", help="A small model writes, and --model where a router says so (R2R).")
    ] = False,
    router: Annotated[
        Path | None, typer.Option("--router", help="Your own router, from `tokenworks train router`.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option("--threshold", help="Of --route or adadec: a number, or adadec's file.")
    ] = None,
    bytes_: Annotated[
        bool, typer.Option("--bytes", help="Write byte by byte; the prompt may end inside a token.")
    ] = False,
    ensemble: Annotated[
        list[str] | None, typer.Option("--ensemble", help="With --bytes: a model to average with; repeatable.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Stop after this many tokens, or bytes with --bytes.")
    ] = 128,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0, greedy, by default; 1 under a constraint.")
    ] = None,
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
    decoding when greedy, and draws from the same distribution when sampling; only the speed differs. A constraint,
    --route, --bytes and adadec change which words are chosen.

    Examples:

        tokenworks generate "Write a haiku about rain." --trace

        tokenworks generate "def fib(n):" --raw -n 64 --method autoregressive

        tokenworks generate "Name three rivers." --draft rsd-s --verify token-matching --temperature 0.8

        tokenworks generate "Give me a date." --regex "[0-9]{4}-[0-9]{2}-[0-9]{2}" --trace

        tokenworks generate "Describe a person." --json-schema person.json --particles 8 --json

        tokenworks generate "Why is the sky blue?" --route --trace

        tokenworks generate "The capital of Fra" --raw --bytes --ensemble gemma-3-270m -n 60

        tokenworks generate - --model ./my-model --temperature 0.8 --seed 7 --json < prompt.txt
    """
    check_trace_out(trace_out)
    given = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    wanted = Wanted(regex, json_schema, grammar)
    said = wanted.read() if wanted.names else ""
    way = _only_one(wanted, route, bytes_, method, draft, verify)
    _used(way, draft_model=draft_model, particles=particles, router=router, threshold=threshold, ensemble=ensemble)

    text = _text(given, may_be_cut=way == "bytes")

    # PyTorch takes seconds to import, and `--help` and a mistyped option should not wait for it.
    from tokenworks.core.models import load
    from tokenworks.core.sampling import Sampling
    from tokenworks.decode import check_names

    method = method or "token-recycling"
    if way == "speculative":
        check_names(method, draft, verify)
    Sampling(temperature or 0.0, top_k, top_p)  # refused before the model is loaded

    def stream(piece: str) -> None:
        if not json_:
            typer.echo(piece, nl=False)

    task = Task(text, given, raw, load(model), max_new_tokens, temperature, top_k, top_p, seed, stream)
    written = {
        "speculative": lambda: ways.speculative(task, method, draft, verify, draft_model),
        "adadec": lambda: ways.paused(task, threshold),
        "constraint": lambda: ways.constrained(task, wanted, said, particles),
        "route": lambda: ways.routed(task, draft_model, router, threshold),
        "bytes": lambda: ways.by_bytes(task, ensemble or []),
    }[way]()
    if json_:
        typer.echo(json.dumps({"text": written.text, **written.facts, "model": model, "seed": seed}))
    else:
        typer.echo()
        typer.echo(written.summary, err=True)
    if trace or trace_out:
        found = written.trace()
        found.meta |= {"title": text.strip()[:90], **written.meta, "model": model, "seed": seed}
        show_trace(found, written.channel, trace, trace_out, err=json_)


def _text(given: bytes, may_be_cut: bool) -> str:
    """A prompt as text; one that is continued byte by byte may end inside a character.

    Raises:
        InputError: it is empty, or not UTF-8.
    """
    if not given.strip():
        raise InputError("prompt: empty; write something for the model to answer or continue")
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        if may_be_cut and error.reason == "unexpected end of data":
            return given[: error.start].decode()
        raise InputError(
            f"prompt: not UTF-8 (byte {given[error.start]:#04x} at {error.start}); convert it to UTF-8 first"
        ) from error


def _only_one(
    wanted: Wanted, route: bool, bytes_: bool, method: str | None, draft: str | None, verify: str | None
) -> str:
    """Which way of writing the options ask for.

    Raises:
        InputError: for more than one.
    """
    asked = [(name, "constraint", True) for name in wanted.names] + [
        ("route", "route", route),
        ("bytes", "bytes", bytes_),
        ("method", "adadec" if method == "adadec" else "speculative", method is not None),
        ("draft", "speculative", draft is not None),
        ("verify", "speculative", verify is not None),
    ]
    chosen = {option: way for option, way, given in asked if given}
    if len(set(chosen.values())) > 1:
        raise InputError(f"{' and '.join(chosen)}: each is a way of writing of its own; choose one")
    return next(iter(chosen.values()), "speculative")


USED_BY = {
    "draft_model": ("speculative", "route"),
    "particles": ("constraint",),
    "router": ("route",),
    "threshold": ("route", "adadec"),
    "ensemble": ("bytes",),
}
"""Options that only some ways of writing look at."""


def _used(way: str, **options: object) -> None:
    """Raise `InputError` for an option that would be passed over in silence."""
    for name, value in options.items():
        if value is not None and value != [] and way not in USED_BY[name]:
            option, belongs = name.replace("_", "-"), " or ".join(USED_BY[name])
            raise InputError(f"{option}: it belongs to {belongs}, and this text is written by {way}; leave it out")
