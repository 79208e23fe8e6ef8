"""Models that a trainer reads beside the one it trains: a DPO model, a reverse model, a reference."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, Trainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from tokenworks.align.reading import check_same_vocabulary
from tokenworks.align.vocabulary import check_head
from tokenworks.core.errors import InputError


def check_frozen(name: str, policy: Any, model: Any) -> None:
    """Raise `InputError` where `model` is no language model with the policy's vocabulary."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{name}: {type(model).__name__} is not a loaded model; pass a PreTrainedModel")
    try:
        check_same_vocabulary(policy, model)
    except InputError as error:
        raise InputError(str(error).replace("ref_model", name)) from None
    check_head(model)


def prepare_frozen(trainer: Trainer, model: PreTrainedModel) -> Any:
    """The model in evaluation mode and without gradients, placed and wrapped as the trainer's own is."""
    model.requires_grad_(False).eval()
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)
