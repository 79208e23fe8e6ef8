"""`tokenworks infill`: fill the blanks of a text with a draw from an any-subset model's joint density (ASSD)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenworks.cli.traces import check_trace_out, show_trace
from tokenworks.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK = re.compile(r"_{3,}(?:\{(\d+)\})?")


def infill(
    text: Annotated[str, typer.Argument(help="A text with blanks, ___ or ___{12}; '-' reads standard input.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Of a blank that does not say how many.")] = 8,
    k: Annotated[int, typer.Option("-k", help="Tokens drafted at a time.")] = 5,
    draft: Annotated[
        str, typer.Option("--draft", help="self, bigram, or none: one token after another.")
    ] = "self",
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the draws.")] = 0,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A folder that `tokenworks train any-subset` wrote.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also show how each token was chosen.")] = False,
    trace_out: Annotated[
        Path | None, typer.Option("--trace-out", help="Write the Trace to a .html page or a .json file.")
    ] = None,
) -> None:
    """Fill the blanks of a text, all of them with regard to each other and to everything around them.

    The model that comes with tokenworks is tiny, knows only Python's documentation and reads 128 tokens: it shows
    the method, not good writing.

    Examples:

        tokenworks infill "Return a list of the ___ in the directory." --trace

        tokenworks infill "If the file ___{4} not exist, ___{10} is raised." --draft bigram --seed 3 --json
    """
    check_trace_out(trace_out)
    given = sys.stdin.read() if text == "-" else text
    if not BLANK.search(given):
        raise InputError("text: no blank in it; write ___ where something is to be filled in")

    from tokenworks.core.sampling import Sampling
    from tokenworks.decode.any_subset import load_any_subset
    from tokenworks.decode.assd import infill as fill

    found, tokenizer = load_any_subset(model)
    ids = with_holes(given, tokenizer, tokens, found.mask_token_id)
    result = fill(found, ids, k, draft, Sampling(temperature), seed)  # type: ignore[arg-type]
    filled = str(tokenizer.decode(result.token_ids))
    if json_:
        kept = {
            "text": filled,
            "token_ids": result.token_ids,
            "evaluations": result.evaluations,
            "holes": len(result.decisions),
            "accepted": result.accepted,
            "log_prob": result.log_prob,
            "draft": draft,
            "k": k,
            "seed": seed,
        }
        typer.echo(json.dumps(kept))
    else:
        typer.echo(filled)
        typer.echo(
            f"{len(result.decisions)} tokens in {result.evaluations} passes of the model, "
            f"log-probability {result.log_prob:.1f} nats",
            err=True,
        )
    if trace or trace_out:
        record = result.trace(tokenizer)
        record.meta |= {"title": given.strip()[:90], "draft": draft, "k": k, "seed": seed}
        show_trace(record, "source", trace, trace_out, err=json_)


def with_holes(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, mask_token_id: int) -> list[int]:
    """Token ids of a text, with a mask for each token of its blanks."""
    ids: list[int] = []
    end = 0
    for blank in BLANK.finditer(text):
        count = tokens if blank[1] is None else int(blank[1])
        if count < 1:
            raise InputError(f"tokens: a blank of {count} tokens; give at least 1")
        ids += [*tokenizer(text[end : blank.start()])["input_ids"], *[mask_token_id] * count]
        end = blank.end()
    return [*ids, *tokenizer(text[end:])["input_ids"]]
