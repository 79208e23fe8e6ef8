"""`tokenworks align`: train a model on preferences with a token-level method, or see what a method would do."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenworks.cli.traces import check_trace_out, show_trace
from tokenworks.core.errors import InputError

if TYPE_CHECKING:
    from tokenworks.align.contract import PreferenceMethod
    from tokenworks.align.scores import Scorer

align = typer.Typer(
    name="align",
    help="Train a model on preferences, token by token, or see what a method would do to a pair.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option("--model", "-m", help="The policy: smollm2-135m, a Hub id, a folder, ...")]
Reference = Annotated[
    str | None, typer.Option("--ref-model", help="By default the policy as it is before training.")
]
Data = Annotated[
    str, typer.Option("--data", "-d", help="Pairs: .jsonl, .parquet, .csv, a Hub data set, or 'sentiment'.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="A YAML file of TRL's training arguments (learning_rate, ...).")
]
Beta = Annotated[float, typer.Option("--beta", help="How dear it is to leave the reference.")]
LoraRank = Annotated[int, typer.Option("--lora-rank", help="Train a LoRA adapter of this rank; 0 trains it all.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out pairs that cannot be used.")]


@align.command()
def dpo(
    data: Data, out: Out, model: Model = "smollm2-135m", ref_model: Reference = None, beta: Beta = 0.1,
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """DPO, the baseline: TRL's own loss."""
    from tokenworks.align import DPO

    _train(lambda policy, reference: (DPO(beta), None), data, out, model, ref_model, lora_rank, config, skip_bad)


@align.command()
def tdpo(
    data: Data, out: Out, model: Model = "smollm2-135m", ref_model: Reference = None, beta: Beta = 0.1,
    alpha: Annotated[float, typer.Option("--alpha", help="Weight of the divergences in tdpo2; 0 is DPO.")] = 0.5,
    variant: Annotated[str, typer.Option("--variant", help="tdpo1 or tdpo2.")] = "tdpo2",
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """TDPO: DPO that also watches how far the whole distribution moves at each token."""
    from tokenworks.align import TDPO

    method = TDPO(beta, alpha, variant)
    _train(lambda policy, reference: (method, None), data, out, model, ref_model, lora_rank, config, skip_bad)


@align.command()
def tgdpo(
    data: Data, out: Out,
    guide: Annotated[str, typer.Option("--guide", help="A model that is aligned already, by DPO for instance.")],
    model: Model = "smollm2-135m", ref_model: Reference = None, beta: Beta = 0.1,
    alpha: Annotated[float, typer.Option("--alpha", help="How far the guide is followed; 0 is DPO.")] = 0.5,
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """TGDPO: DPO in which an aligned model says which tokens may move."""
    from tokenworks.align import TGDPO, guide_rewards
    from tokenworks.core.models import load

    method, aligned = TGDPO(beta, alpha), load(guide).model
    _train(
        lambda policy, reference: (method, guide_rewards(aligned, reference, beta)),
        data, out, model, ref_model, lora_rank, config, skip_bad,
    )  # fmt: skip


@align.command()
def sparsepo(
    data: Data, out: Out, model: Model = "smollm2-135m", ref_model: Reference = None, beta: Beta = 0.8,
    mask: Annotated[str, typer.Option("--mask", help="independent, common or activations.")] = "independent",
    l1: Annotated[float, typer.Option("--l1", help="Price of a mask; larger leaves out more tokens.")] = 0.0,
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """SparsePO: masks that say which tokens count, learned or from the reference's activations."""
    from tokenworks.align import SparsePO
    from tokenworks.align.mapo import activation_scores

    def make(policy: Any, reference: Any) -> tuple[PreferenceMethod, Scorer | None]:
        if mask == "activations":
            return SparsePO("scores", beta=beta, l1_u=l1, l1_d=l1), activation_scores(reference)
        shape = reference.config.get_text_config()
        return SparsePO(mask, shape.num_hidden_layers, shape.hidden_size, beta, l1, l1), None

    _train(make, data, out, model, ref_model, lora_rank, config, skip_bad)


@align.command()
def cdpo(
    data: Data, out: Out,
    right: Annotated[str, typer.Option("--right", help="The model, tuned on right answers.")],
    wrong: Annotated[str, typer.Option("--wrong", help="The model, tuned on wrong answers.")],
    model: Model = "smollm2-135m", ref_model: Reference = None, beta: Beta = 0.1,
    gamma: Annotated[float, typer.Option("--gamma", help="How strongly the two are contrasted.")] = 1.0,
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """cDPO: DPO that pushes down the tokens that made an answer wrong."""
    from tokenworks.align import CDPO, contrastive_scores
    from tokenworks.core.models import load

    method, scorer = CDPO(beta), contrastive_scores(load(right).model, load(wrong).model, gamma)
    _train(lambda policy, reference: (method, scorer), data, out, model, ref_model, lora_rank, config, skip_bad)


@align.command()
def aligndistil(
    data: Data, out: Out,
    dpo_model: Annotated[str, typer.Option("--dpo", help="The model after DPO on the pairs.")],
    reverse: Annotated[str, typer.Option("--reverse", help="The model after DPO with the preferences reversed.")],
    model: Model = "smollm2-135m",
    strength: Annotated[float, typer.Option("--strength", help="How far the teacher goes beyond --dpo.")] = 15.0,
    on_policy: Annotated[
        bool, typer.Option("--on-policy/--off-policy", help="Learn from its own texts, or the chosen ones.")
    ] = True,
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """AlignDistil: distillation from a teacher that goes beyond a DPO model where it differs from its reverse."""
    settings = read_config(config)

    from tokenworks.align.aligndistil_trainer import AlignDistilConfig, AlignDistilTrainer
    from tokenworks.cli.training import latest_checkpoint, lora, training_arguments
    from tokenworks.core.models import load

    pairs, loaded = read_pairs(data, skip_bad), load(model)
    settings |= {"strength": strength, "on_policy": on_policy}
    trainer = AlignDistilTrainer(
        loaded.model, load(dpo_model).model, reverse_model=load(reverse).model,
        args=training_arguments(AlignDistilConfig, out, settings), train_dataset=pairs,
        processing_class=loaded.tokenizer, peft_config=lora(lora_rank),
    )  # fmt: skip
    run_training(trainer, out, latest_checkpoint(out))


@align.command()
def rto(
    data: Data, out: Out,
    reward: Annotated[str, typer.Option("--reward", help="FILE.py:function, or sentiment.")],
    dpo_model: Annotated[
        str | None, typer.Option("--dpo", help="The model after DPO, which rewards single tokens; none is PPO.")
    ] = None,
    model: Model = "smollm2-135m",
    beta1: Annotated[float, typer.Option("--beta1", help="Weight of the token rewards.")] = 0.05,
    lora_rank: LoraRank = 0, config: Config = None, skip_bad: SkipBad = False,
) -> None:  # fmt: skip
    """RTO: PPO in which a DPO model says which tokens earned the reward."""
    settings = read_config(config)
    judge = read_reward(reward)

    from tokenworks.align.rto_trainer import RTOConfig, RTOTrainer
    from tokenworks.cli.training import latest_checkpoint, lora, training_arguments
    from tokenworks.core.models import load

    prompts, loaded = read_pairs(data, skip_bad).select_columns("prompt"), load(model)
    settings |= {"beta1": beta1 if dpo_model is not None else 0.0}
    trainer = RTOTrainer(
        loaded.model, judge, dpo_model=None if dpo_model is None else load(dpo_model).model,
        args=training_arguments(RTOConfig, out, settings), train_dataset=prompts,
        processing_class=loaded.tokenizer, peft_config=lora(lora_rank),
    )  # fmt: skip
    run_training(trainer, out, latest_checkpoint(out))


@align.command()
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


Making = Callable[[Any, Any], "tuple[PreferenceMethod, Scorer | None]"]
"""From policy and reference a method, and the scorer that it needs."""


def _train(
    make: Making, data: str, out: Path, model: str, ref_model: str | None, lora_rank: int, config: Path | None,
    skip_bad: bool,
) -> None:  # fmt: skip
    """What the methods that TokenPreferenceTrainer runs do alike."""
    if lora_rank < 0:
        raise InputError(f"lora-rank: {lora_rank} is not 0 or more")
    settings = read_config(config)

    from tokenworks.align.trainer import TokenPreferenceConfig, TokenPreferenceTrainer
    from tokenworks.cli.training import latest_checkpoint, lora, training_arguments
    from tokenworks.core.models import load

    pairs = read_pairs(data, skip_bad)
    loaded = load(model)
    reference = load(ref_model or model).model
    method, scorer = make(loaded.model, reference)
    args = training_arguments(TokenPreferenceConfig, out, settings)
    trainer = TokenPreferenceTrainer(
        loaded.model, None if lora_rank and ref_model is None else reference, method=method, scorer=scorer,
        args=args, train_dataset=pairs, processing_class=loaded.tokenizer, peft_config=lora(lora_rank),
    )  # fmt: skip
    run_training(trainer, out, latest_checkpoint(out))


def run_training(trainer: Any, out: Path, checkpoint: str | None) -> None:
    """Train with a bar, keep the model in `out`, and print what it came to as JSON."""
    from tokenworks.cli.training import shown_progress

    with shown_progress(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(out))
    last: dict[str, float] = next((row for row in reversed(trainer.state.log_history) if "loss" in row), {})
    names = ("loss", "rewards/margins", "rewards/accuracies", "reward")
    found = {name: last[name] for name in names if name in last}
    typer.echo(json.dumps({"folder": str(out), "steps": trainer.state.global_step, **found}))


@align.command()
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


def read_config(path: Path | None) -> dict[str, Any]:
    """A YAML file of training arguments.

    Raises:
        InputError: it is not there, or not a mapping.
    """
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config: cannot read {path} ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"config: {path} is no mapping of names to values, such as learning_rate: 1.0e-6")
    return found


def read_reward(named: str) -> Callable[..., list[float]]:
    """A reward function as TRL calls them: of `prompts` and `completions`, one number for each.

    Args:
        named: "FILE.py:function", or "sentiment" for VADER's compound score.

    Raises:
        InputError: no such file or function.
    """
    if named == "sentiment":
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        judge = SentimentIntensityAnalyzer()
        return lambda completions, **_: [judge.polarity_scores(_plain(text))["compound"] for text in completions]
    path, _, name = named.rpartition(":")
    if not path or not Path(path).is_file():
        raise InputError(f"reward: {named!r} is neither sentiment nor FILE.py:function with a file that is there")
    try:
        found = runpy.run_path(path)
    except Exception as error:
        raise InputError(f"reward: {path} raised {error!r}") from error
    if not callable(found.get(name)):
        raise InputError(f"reward: {path} defines no function {name!r}")
    return found[name]


def _plain(completion: Any) -> str:
    """A completion is a text, or a list of messages for conversational data."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def read_pairs(data: str, skip_bad: bool) -> Any:
    """The user's pairs, or the embedded ones by the name "sentiment"."""
    from datasets import Dataset

    from tokenworks.align import load_pairs, sentiment_pairs

    if data != "sentiment":
        return load_pairs(data, skip_bad=skip_bad)
    return load_pairs(Dataset.from_list([vars(pair) for pair in sentiment_pairs("train")]))
