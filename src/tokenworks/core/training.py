"""One training loop for the small models that come with tokenworks: AdamW, resumable to the same result."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.files import atomic_write

Progress = Callable[[int, int, str], None]
"""Called with the pieces done, the pieces in all, and what is being done."""


def quiet(done: int, total: int, what: str) -> None:
    """The Progress that says nothing."""


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    checkpoint: Path | None = None,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    keep_every: int = 100,
    progress: Progress = quiet,
) -> list[float]:
    """Minimise `loss_at(step)` over the parameters of `model` that require a gradient.

    Linear warm-up, then a cosine down to zero; gradients are clipped to norm 1.

    Args:
        loss_at: the loss of one step as a scalar. Whatever it draws should depend on the step alone, so that a run
            that was cut off and goes on is the run that was not.
        steps: at least 1.
        checkpoint: a file to keep the state in; a run that finds it goes on from there. Removed at the end.
        warmup: share of the steps, in [0, 1).
        keep_every: steps between checkpoints.

    Returns:
        The loss at every step of this run.

    Raises:
        InputError: no steps, or no parameter to train.
        NumericalError: a loss is NaN or infinite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if steps < 1:
        raise InputError(f"steps: {steps} is not at least 1")
    if not trained:
        raise InputError("model: none of its parameters requires a gradient; there is nothing to train")
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    rising = max(1, round(warmup * steps))

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for parameter, kept in zip(trained, state["trained"], strict=True):
            parameter.data.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        losses = state["losses"]
    for step in range(len(losses), steps):
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise NumericalError(f"model: the loss is {float(loss)} at step {step}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(step + 1, steps, f"loss {losses[-1]:.3f}")
        if checkpoint is not None and (step + 1) % keep_every == 0:
            state = {
                "trained": [p.data for p in trained],
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "losses": losses,
            }
            with atomic_write(checkpoint, "wb") as out:
                torch.save(state, out)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return losses


def save_small(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a model whose head is tied to its embeddings in half precision, and its tokenizer."""
    tokenizer.save_pretrained(out)
    model.config.save_pretrained(out)
    kept = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}
    with atomic_write(out / "model.safetensors", "wb") as file:
        file.write(save(kept, metadata={"format": "pt"}))
