"""`tokenworks bench`: which method is fastest on your model and your prompts?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenworks.core.errors import InputError

bench = typer.Typer(name="bench", help="Run methods side by side on your model and prompts.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    pass


@bench.command("decode")
def decode(
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", "-p", help=".txt, .jsonl, .json, .csv or .parquet; the embedded ones if left out."
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="As in `tokenworks generate`.")] = "smollm2-135m",
    draft_model: Annotated[
        str | None, typer.Option("--draft-model", help="Your own draft model: a folder, a Hub id or a .gguf file.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Use at most so many prompts.")] = 12,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="For each prompt.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option("--top-p", help="As in `tokenworks generate`.")] = None,
    plot: Annotated[Path, typer.Option("--plot", help="Where to save the plot (.png, .svg or .pdf).")] = Path(
        "bench-decode.png"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Every drafter with every verifier that is lossless for it, against plain decoding, in one run.

    Example:

        tokenworks bench decode --prompts my_prompts.jsonl --temperature 0.8 --plot speed.svg
    """
    from tokenworks.core.data import load_prompts
    from tokenworks.core.data import prompts as embedded
    from tokenworks.core.measure import machine_facts
    from tokenworks.core.models import load
    from tokenworks.core.sampling import Sampling
    from tokenworks.core.session import Session
    from tokenworks.core.text import encode_prompt, stop_ids
    from tokenworks.decode import open_draft
    from tokenworks.decode.grid import lossless_pairs, measure_grid
    from tokenworks.report.bars import check_format, save_grid

    check_format(plot)
    if limit < 2:
        raise InputError(f"limit: {limit} prompts are too few for an interval; use at least 2")
    sampling = Sampling(temperature, top_p=top_p)
    chosen = (embedded(split="test") if prompts is None else load_prompts(prompts))[:limit]
    loaded = load(model)
    session = Session(loaded.model)
    ids = [encode_prompt(loaded.tokenizer, prompt.text) for prompt in chosen]
    drafts = None if draft_model is None else open_draft(session, loaded.tokenizer, draft_model)
    decoders = lossless_pairs(session, drafts, sampling)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("decoding", total=len(decoders) * len(ids))
        rows = measure_grid(
            decoders,
            ids,
            stop_ids(loaded.model, loaded.tokenizer),
            max_new_tokens,
            lambda done: bar.update(task, completed=done),
        )
    how = "greedy" if sampling.greedy else f"temperature {temperature:g}"
    title = f"{model}: {len(ids)} prompts, {max_new_tokens} new tokens, {how}"
    save_grid(rows, plot, title)
    if json_:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(title=title)
    for heading in ("draft", "verify", "tokens/s", "tokens a pass", "from the draft", "times plain"):
        table.add_column(heading, no_wrap=heading in ("draft", "verify"))
    if sampling.greedy:
        table.add_column("words of plain")
    for row in rows:
        cells = (
            row.draft,
            row.verify,
            f"{row.tokens_per_second:.1f}",
            str(row.tokens_per_pass),
            f"{row.draft_share:.0%}",
            str(row.times_plain),
        )
        table.add_row(*cells, *([f"{row.same_words:.0%}"] if sampling.greedy else []))
    Console().print(table)
    typer.echo(f"95% intervals over prompts. Pairs that are not listed would not be lossless. Plot: {plot}")
    typer.echo(", ".join(f"{key} {value}" for key, value in machine_facts().items()))
