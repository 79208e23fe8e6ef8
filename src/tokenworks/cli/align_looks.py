"""What `tokenworks align` shows without training: the texts a policy holds best, and what a method would push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenworks.cli.traces import check_trace_out, show_trace
from tokenworks.core.errors import InputError

if TYPE_CHECKING:
    from tokenworks.align.scores import Scorer

Model = Annotated[str, typer.Option("--model", "-m", help="The policy: smollm2-135m, a Hub id, a folder, ...")]
Reference = Annotated[
    str | None, typer.Option("--ref-model", help="By default the policy as it is before training.")
]
Beta = Annotated[float, typer.Option("--beta", help="How dear it is to leave the reference.")]


def search(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    model: Model = "smollm2-135m",
    ref_model: Reference = None,
    scorer: Annotated[
        str, typer.Option("--scorer", help="policy: likelihood; implicit: DPO's reward, needs --ref-model.")
    ] = "policy",
    beams: Annotated[int, typer.Option("--beams", help="Texts side by side.")] = 5,
    simulations: Annotated[
        int | None, typer.Option("--simulations", help="Monte-Carlo tree search of so many, not beams.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Of a text.")] = 48,
    beta: Beta = 0.1,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also show what each token added.")] = False,
    trace_out: Annotated[
        Path | None, typer.Option("--trace-out", help="Write the Trace to a .html page or a .json file.")
    ] = None,
) -> None:
    """Search for the text that a DPO policy holds best (From r to Q*).

    Example:

        tokenworks align search "The hotel was" --raw --model ./aligned --ref-model smollm2-135m --scorer implicit
    """
    check_trace_out(trace_out)

    from tokenworks.align.search import beam_search
    from tokenworks.align.tree_search import mcts
    from tokenworks.core.models import load
    from tokenworks.core.session import Session
    from tokenworks.core.text import encode_prompt, stop_ids

    loaded = load(model)
    reference = None if ref_model is None else Session(load(ref_model).model)
    ids, stops = encode_prompt(loaded.tokenizer, prompt, raw), stop_ids(loaded.model, loaded.tokenizer)
    kind: Any = scorer  # refused by the search, if it is none
    common: dict[str, Any] = {"stop_ids": stops, "reference": reference, "scorer": kind, "beta": beta}
    if simulations is None:
        found = beam_search(Session(loaded.model), ids, beams, max_new_tokens, **common)
    else:
        found = mcts(Session(loaded.model), ids, simulations, max_new_tokens, **common)
    for text in found.texts:
        written = loaded.tokenizer.decode(list(text.token_ids), skip_special_tokens=True)
        typer.echo(f"{text.score:9.3f}  {written!r}")
    typer.echo(f"{found.passes} passes of each model", err=True)
    if trace or trace_out:
        record = found.trace(loaded.tokenizer)
        record.meta |= {"title": prompt[:90], "scorer": scorer, "model": model}
        show_trace(record, "reward" if reference is not None else "log_p", trace, trace_out, err=False)


def explain(
    method: Annotated[str, typer.Argument(help="dpo, tdpo, tgdpo, sparsepo or cdpo.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What both responses answer or continue.")],
    chosen: Annotated[str, typer.Option("--chosen", help="The better response.")],
    rejected: Annotated[str, typer.Option("--rejected", help="The worse response.")],
    model: Model = "smollm2-135m",
    ref_model: Annotated[
        str, typer.Option("--ref-model", help="The model before it was aligned.")
    ] = "smollm2-135m",
    guide: Annotated[str | None, typer.Option("--guide", help="Of tgdpo: a model that is aligned.")] = None,
    right: Annotated[
        str | None, typer.Option("--right", help="Of cdpo: the model tuned on right answers.")
    ] = None,
    wrong: Annotated[
        str | None, typer.Option("--wrong", help="Of cdpo: the model tuned on wrong answers.")
    ] = None,
    channel: Annotated[str, typer.Option("--channel", help="What to show; --trace-out keeps them all.")] = "push",
    json_: Annotated[bool, typer.Option("--json", help="Print both Traces as JSON.")] = False,
    trace_out: Annotated[
        Path | None,
        typer.Option("--trace-out", help="Write both Traces to NAME-chosen and NAME-rejected .html or .json."),
    ] = None,
) -> None:
    """Show which tokens of a pair a method would push, how hard, and why.

    Example:

        tokenworks align explain tdpo -p "The film was" --chosen " a joy to watch." --rejected " a waste of time."
    """
    check_trace_out(trace_out)
    if method not in ("dpo", "tdpo", "tgdpo", "sparsepo", "cdpo"):
        raise InputError(f"method: no {method!r} to explain; there are dpo, tdpo, tgdpo, sparsepo, cdpo")

    from tokenworks.align.explain import explain as look
    from tokenworks.core.models import load

    loaded = load(model)
    reference = load(ref_model).model
    chosen_method, scorer = _explained(method, reference, {"guide": guide, "right": right, "wrong": wrong})
    traces = look(loaded.model, reference, loaded.tokenizer, prompt, chosen, rejected, chosen_method, scorer)
    if json_:
        typer.echo(json.dumps([trace.to_dict() for trace in traces]))
    for side, trace in zip(("chosen", "rejected"), traces, strict=True):
        trace.meta |= {"method": method, "model": model}
        if not json_:
            typer.echo(f"{side}:")
        target = None if trace_out is None else trace_out.with_stem(f"{trace_out.stem}-{side}")
        show_trace(trace, channel, not json_, target, err=False)


def _explained(method: str, reference: Any, models: dict[str, str | None]) -> tuple[Any, Scorer | None]:
    """A method as its paper sets it, with the scorer it needs from the user's models."""
    from tokenworks.align import CDPO, DPO, TDPO, TGDPO, SparsePO, contrastive_scores, guide_rewards
    from tokenworks.align.mapo import activation_scores
    from tokenworks.core.models import load

    def given(name: str) -> Any:
        path = models[name]
        if path is None:
            raise InputError(f"{name}: {method} needs it; name a model")
        return load(path).model

    if method == "tgdpo":
        return TGDPO(), guide_rewards(given("guide"), reference)
    if method == "cdpo":
        return CDPO(), contrastive_scores(given("right"), given("wrong"))
    if method == "sparsepo":
        return SparsePO("scores"), activation_scores(reference)
    return (DPO() if method == "dpo" else TDPO()), None
