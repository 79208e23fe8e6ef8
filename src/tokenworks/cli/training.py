"""What every verb that trains with TRL does alike: arguments, LoRA, going on, and a bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from tokenworks.cli.bars import progress_bar
from tokenworks.core.errors import InputError

Arguments = TypeVar("Arguments")

SHOWN = (("loss", "loss"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"), ("reward", "reward"))
"""Numbers of TRL's logs that the bar shows, and how it calls them."""


def training_arguments(kind: type[Arguments], out: Path, settings: dict[str, Any]) -> Arguments:
    """TRL's arguments from a user's settings; what those leave out is set for the machine at hand.

    Raises:
        InputError: a name that TRL does not know, or a value that it refuses.
    """
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "use_cpu": not gpu, "bf16": gpu, "gradient_checkpointing": gpu, "report_to": [], "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 50, "save_total_limit": 2, "disable_tqdm": True,
    }  # fmt: skip
    if "output_dir" in settings:
        raise InputError("config: output_dir is given by --out; leave it out")
    known = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise InputError(f"config: no training argument {name!r}" + (f"; is it {near[0]}?" if near else ""))
    try:
        return kind(output_dir=str(out), **(defaults | settings))  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {error}") from error


def lora(rank: int) -> PeftConfig | None:
    """A LoRA adapter on all linear layers but the head; None for rank 0."""
    if rank == 0:
        return None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def latest_checkpoint(out: Path) -> str | None:
    """Where a run that was cut off stopped; None if there was none."""
    found: str | None = get_last_checkpoint(str(out)) if out.is_dir() else None
    return found


@contextmanager
def shown_progress(trainer: Any) -> Iterator[None]:
    """A bar on stderr with the steps and the last logged numbers, in place of the trainer's own printing."""
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        class Show(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
                numbers = [f"{short} {logs[name]:.3f}" for name, short in SHOWN if name in (logs or {})]
                bar.update(task, completed=state.global_step, total=state.max_steps, description=" ".join(numbers))

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Show)
        yield
