"""`tokenworks align`: train a model on preferences with a token-level method, or see what a method would do."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenworks.cli.align_looks import Beta, Model, Reference, explain, search
from tokenworks.core.errors import InputError

if TYPE_CHECKING:
    from tokenworks.align.contract import PreferenceMethod
    from tokenworks.align.scores import Scorer

align = typer.Typer(
    name="align",
    help="Train a model on preferences, token by token, or see what a method would do to a pair.",
    no_args_is_help=True,
)
for look in (search, explain):
    align.command()(look)

Data = Annotated[
    str, typer.Option("--data", "-d", help="Pairs: .jsonl, .parquet, .csv, a Hub data set, or 'sentiment'.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a run cut off goes on there.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="A YAML file of TRL's training arguments (learning_rate, ...).")
]
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
