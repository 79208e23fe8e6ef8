"""From a user's prompt to token ids, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.errors import InputError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool = False) -> list[int]:
    """Token ids of `prompt`, as one user message in the tokenizer's chat template if it has one.

    Args:
        raw: continue the text as it stands, without a chat template.

    Raises:
        InputError: the prompt is empty, or only white space where a chat template wants a message.
    """
    templated = tokenizer.chat_template is not None and not raw
    if not (prompt.strip() if templated else prompt):
        raise InputError("prompt: empty; write something for the model to continue")
    if templated:
        message = [{"role": "user", "content": prompt}]
        found: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    else:
        found = tokenizer(prompt)
    return list(found["input_ids"])


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end generation: the model's generation config's, else the tokenizer's end of text."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = configured if configured is not None else tokenizer.eos_token_id
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def one_prompt(prompt: Sequence[int] | Tensor, context_limit: int) -> list[int]:
    """The ids of a prompt, of which there must be at least one, and not more than a context holds.

    Raises:
        InputError: it is empty, a batch, or too long.
    """
    ids = torch.as_tensor(prompt)
    if ids.dim() == 2 and len(ids) > 1:
        raise InputError(f"prompt: a batch of {len(ids)} is not supported; decode one prompt at a time")
    if ids.numel() == 0:
        raise InputError("prompt: empty; give at least one token")
    if ids.numel() > context_limit:
        raise InputError(f"prompt: {ids.numel()} tokens do not fit the model's context of {context_limit}")
    return [int(token) for token in ids.flatten()]


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
