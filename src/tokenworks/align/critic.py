"""The critic of PPO: what a text that was begun is still worth, at every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenworks.core.errors import InputError

HIDDEN = 256


class Critic(nn.Module):
    """A small network on the frozen reference's last states: float [..., width] to [...]. It begins at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.layers(states)[..., 0]
        return found


def values_of(critic: Any, ids: Tensor, attention: Tensor, states: Tensor | None, mask: Tensor) -> Tensor:
    """The value before each response token: float [B, T], zero outside the mask.

    Args:
        ids, attention: int64 [B, S], of whole texts, the response last.
        states: float [B, T, d] of the reference; None where the critic reads the texts itself.
        mask: bool [B, T].
    """
    if states is None:
        logits = critic(input_ids=ids, attention_mask=attention).logits
        found = logits[:, -mask.shape[1] - 1 : -1, 0]
    else:
        found = critic(states)
    return torch.where(mask, found.float(), 0.0)


@torch.no_grad()
def check_critic(critic: nn.Module, width: int) -> None:
    """Raise `InputError` for a critic with dropout, which would make every ratio of values noise, or of another
    shape than `values_of` expects."""
    active = [name for name, part in critic.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if active:
        raise InputError(
            f"critic: it has dropout ({active[0]}); set its probability to 0, with classifier_dropout=0.0 where a "
            "token classifier is loaded"
        )
    if isinstance(critic, PreTrainedModel):
        if getattr(critic.config, "num_labels", None) != 1 or "TokenClassification" not in type(critic).__name__:
            raise InputError(
                f"critic: {type(critic).__name__} is no token classifier with one label; load it with "
                "AutoModelForTokenClassification.from_pretrained(..., num_labels=1)"
            )
        return
    try:
        shape = tuple(critic(torch.zeros(2, 3, width, device=next(critic.parameters()).device)).shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"critic: it does not take states [B, T, {width}] ({error})") from error
    if shape != (2, 3):
        raise InputError(f"critic: of states [2, 3, {width}] it makes {list(shape)}; it must give [2, 3]")
