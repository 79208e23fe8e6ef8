"""`tokenworks train`: make the small models that some methods need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tokenworks.cli.bars import progress_bar

train = typer.Typer(name="train", help="Make the small models that some methods need.", no_args_is_help=True)


@train.callback()
def _group() -> None:
    pass


@train.command("draft")
def draft(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The target, as in `tokenworks generate`.")] = (
        "smollm2-135m"
    ),
    layers: Annotated[str, typer.Option("--layers", help="The target's layers to begin with.")] = "0,29",
    batches: Annotated[int, typer.Option("--batches", help="Of 18,432 tokens, written by the target.")] = 18,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of 3,072 tokens.")] = 700,
) -> None:
    """Distil a draft model for a target, on text the target writes itself.

    About 20 minutes of writing and 30 of training for SmolLM2-135M on two CPU cores. Then:

        tokenworks generate "Why is the sky blue?" --method spectr --draft-model OUT
    """
    from tokenworks.core.errors import InputError
    from tokenworks.core.models import load
    from tokenworks.decode.distil import distil

    try:
        chosen = [int(part) for part in layers.split(",")]
    except ValueError:
        raise InputError(f"layers: {layers!r} is not a list of numbers such as 0,29") from None
    loaded = load(model)
    with _progress() as show:
        found = distil(loaded.model, loaded.tokenizer, out, chosen, batches, steps, progress=show)
    _say(out, found)


@train.command("prompt-tokens")
def prompt_tokens(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The target, as in `tokenworks generate`.")] = (
        "smollm2-135m"
    ),
    prompts: Annotated[int, typer.Option("--prompts", help="How many tokens beyond the next are guessed.")] = 3,
    batches: Annotated[int, typer.Option("--batches", help="Of 18,432 tokens, written by the target.")] = 18,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of 64 places in a text.")] = 700,
) -> None:
    """Train the prompt tokens of parallel prompt decoding (PPD), on text the target writes itself.

    About 20 minutes of writing and 25 of training for SmolLM2-135M on two CPU cores. Then, in Python:

        drafter = load_prompt_tokens(model, OUT).drafter(session)
    """
    from tokenworks.core.models import load
    from tokenworks.decode.ppd_training import train_prompt_tokens

    loaded = load(model)
    with _progress() as show:
        found = train_prompt_tokens(
            loaded.model, loaded.tokenizer, out, prompts, batches=batches, steps=steps, progress=show
        )
    _say(out, found)


@train.command("any-subset")
def any_subset(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")],
    steps: Annotated[int, typer.Option("--steps", help="Training steps of 1,024 tokens.")] = 1200,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the weights and of what is drawn.")] = 0,
) -> None:
    """Train the small any-subset model of ASSD from scratch, on Python's documentation.

    About 20 minutes on two CPU cores. Then: tokenworks infill "Return ___ list." --model OUT
    """
    from tokenworks.decode.any_subset import train_any_subset

    with _progress() as show:
        found = train_any_subset(out, steps, seed=seed, progress=show)
    _say(out, found)


@train.command("masked-diffusion")
def masked_diffusion(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")],
    steps: Annotated[
        int, typer.Option("--steps", help="Of each of two rounds of diffusion, 1,152 tokens.")
    ] = 1500,
    causal_steps: Annotated[
        int, typer.Option("--causal-steps", help="Causal steps before them, and of the guide.")
    ] = 900,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the weights and of what is drawn.")] = 0,
) -> None:
    """Train the small masked-diffusion model and its guide from scratch, on additions and Python's documentation.

    About 40 minutes on two CPU cores. Then: tokenworks diffuse "583+764=" --model OUT
    """
    from tokenworks.decode.masked_diffusion import train_masked_diffusion

    with _progress() as show:
        found = train_masked_diffusion(out, steps, causal_steps, seed=seed, progress=show)
    _say(out, found)


@train.command("router")
def router(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The large model, as in `tokenworks generate`.")] = (
        "smollm2-135m"
    ),
    draft_model: Annotated[
        str | None, typer.Option("--draft-model", help="The small one; by default SmolLM2's draft model.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Of 256 tokens, written by the large model.")] = 72,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of 1,024 places in a text.")] = 200,
) -> None:
    """Train a router (R2R): which tokens of a small model should be the large model's?

    About 12 minutes of labelling and one of training for SmolLM2-135M on one CPU core. Then:

        tokenworks generate "Why is the sky blue?" --route --router OUT
    """
    from tokenworks.core.models import load
    from tokenworks.core.session import Session
    from tokenworks.decode import open_draft
    from tokenworks.decode.distil import load_draft
    from tokenworks.decode.r2r_training import make_router

    loaded = load(model)
    session = Session(loaded.model)
    small = (
        load_draft(loaded.model, session.vocab_size)
        if draft_model is None
        else open_draft(session, loaded.tokenizer, draft_model)
    )
    with _progress() as show:
        found = make_router(loaded.model, small, loaded.tokenizer, out, rows, steps, progress=show)
    _say(out, found)


@train.command("threshold")
def threshold(
    data: Annotated[
        str, typer.Argument(help="Prompts and references: .jsonl, .csv, .parquet, with these two columns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .json file to write.")],
    model: Annotated[str, typer.Option("--model", "-m", help="As in `tokenworks generate`.")] = "smollm2-135m",
) -> None:
    """Learn the entropy threshold of AdaDec: where should this model stop to think?

    It reads the references, a few thousand tokens in a minute. Then:

        tokenworks generate "def fib(n):" --raw --method adadec --threshold OUT
    """
    from tokenworks.core.data import load_records
    from tokenworks.core.errors import InputError
    from tokenworks.core.models import load
    from tokenworks.decode.adadec_threshold import learn_threshold

    if out.suffix != ".json":
        raise InputError(f"out: {out} must end in .json")
    rows = load_records(data)
    try:
        pairs = [(row["prompt"], row["reference"]) for row in rows]
    except KeyError as error:
        raise InputError(f"data: a record has no {error}; each needs a prompt and a reference") from error
    made_by = f"tokenworks train threshold {data} --model {model}"
    found = learn_threshold(load(model), pairs, made_by=made_by)
    found.save(out)
    typer.echo(json.dumps({"file": str(out), "tau": found.tau, "auc": found.auc, "pause_rate": found.pause_rate}))


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, and what moves it: pieces done, pieces in all, what is being done."""
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show


def _say(out: Path, found: dict[str, float]) -> None:
    typer.echo(json.dumps({"folder": str(out), **{name: round(value, 4) for name, value in found.items()}}))
