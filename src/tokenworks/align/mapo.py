"""MaPO: SparsePO's mask without parameters, from what the reference's layers do at each token (arXiv 2410.05102).

Of every site in the network the mean over its channels is rescaled over the response to [0, 1]; sites are averaged
within their kind, and the kinds with each other. (The paper also takes z-scores before it rescales, which the
rescaling undoes.) The mask is dense, and looks at the whole response: it is data, not a prediction.

Queries and keys are looked at before and after they are rotated.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenworks.align.scores import Scorer
from tokenworks.core.errors import InputError, UnsupportedModelError

KINDS = {
    "mlp": ("act_fn", "act", "activation_fn"),
    "attention": (
        "q_proj", "k_proj", "v_proj", "attn.c_attn", "query_key_value",
        "<o_proj", "<attn.c_proj", "<attention.dense", "<self_attn.out_proj",
    ),
    "residual": (
        "embed_tokens", "wte", "embed_in",
        "input_layernorm", "self_attn_layer_norm", "ln_1",
        "self_attn", "attn", "attention",
        "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "ln_2",
        "<post_attention_layernorm", "<pre_feedforward_layernorm", "<ln_2", "<#.final_layer_norm",
        "final_layer_norm",
        "mlp", "fc2", "layers.#", "h.#", "norm", "ln_f",
    ),
}  # fmt: skip
"""Kinds of sites: ends of the names under which models keep modules (# is a layer's number), whose results are
looked at, or with "<" what goes into them: what the last projection of attention is given, and the residual
between the halves of a layer."""

MAPPINGS = ("rescale", "sigmoid")

ROTATE = "apply_rotary_pos_emb"
"""What rotates queries and keys [1, heads, S, channels], in the file of every model that does."""


def activation_scores(
    reference: PreTrainedModel, kinds: Sequence[str] = tuple(KINDS), mapping: str = "rescale"
) -> Scorer:
    """A scorer that gives each token of a response its mask, in [0, 1].

    Args:
        kinds: of `KINDS`.
        mapping: of a site to [0, 1]. "rescale" is the paper's; "sigmoid" takes the mean of sigmoids over channels
            and looks at no other token.

    Raises:
        InputError: no such kind or mapping.
        UnsupportedModelError: the model has no site of a kind under a known name.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise InputError(f"kinds: no {', '.join(sorted(unknown)) or 'kind given'}; there are {', '.join(KINDS)}")
    if mapping not in MAPPINGS:
        raise InputError(f"mapping: no {mapping!r}; there are {', '.join(MAPPINGS)}")
    sites = {kind: _sites(reference, KINDS[kind]) for kind in kinds}
    for kind, found in sites.items():
        if not found:
            raise UnsupportedModelError(
                f"reference: {type(reference).__name__} has no {kind} module under a known name "
                f"({', '.join(KINDS[kind])}); leave the kind out"
            )

    @torch.inference_mode()
    def score(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        if not prompt or not response:
            raise InputError("prompt, response: empty; both need at least one token")
        # The state that predicts a token is the one before it.
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        ids = torch.tensor([[*prompt, *response]], device=reference.device)
        maps: dict[str, list[Tensor]] = defaultdict(list)

        def see(kind: str, value: Tensor) -> None:
            # OPT's MLP runs on all tokens as one row of the batch's.
            rows = value.reshape(ids.shape[1], -1)[places].float()
            maps[kind].append(_rescaled(rows) if mapping == "rescale" else rows.sigmoid().mean(-1))

        rotation = _rotating(reference.base_model, partial(see, "attention"))
        with _watching(sites, see), rotation if "attention" in kinds else nullcontext():
            reference.base_model(input_ids=ids, use_cache=False)
        mask: list[float] = torch.stack([torch.stack(maps[kind]).mean(0) for kind in kinds]).mean(0).tolist()
        return mask

    return score


Site = tuple[nn.Module, bool]
"""A module, and whether its input is looked at in place of its result."""


def _sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    found = []
    for path, module in model.named_modules():
        dotted = "." + re.sub(r"\.\d+\b", ".#", path)
        found += [(module, name[0] == "<") for name in names if dotted.endswith("." + name.lstrip("<"))]
    return found


def _rescaled(rows: Tensor) -> Tensor:
    """Means of rows [n, channels], to [0, 1] over the rows; 1 if all are the same but for rounding, so that none
    is left out for that."""
    values = rows.mean(-1)
    low, high = values.min(), values.max()
    same = high - low <= 1e-5 * rows.abs().mean()
    return torch.ones_like(values) if same else (values - low) / (high - low)


@contextmanager
def _watching(sites: dict[str, list[Site]], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand what every site [1, S, channels] gives to `see` until the context ends, be it by an error."""

    def after(kind: str) -> Any:
        return lambda _, __, result: see(kind, result[0] if isinstance(result, tuple) else result)

    def before(kind: str) -> Any:
        return lambda _, inputs: see(kind, inputs[0])

    handles: list[Any] = []
    try:
        for kind, found in sites.items():
            for module, into in found:
                handles.append(
                    module.register_forward_pre_hook(before(kind))
                    if into
                    else module.register_forward_hook(after(kind))
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rotating(model: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand rotated queries and keys [1, S, heads, channels] to `see` until the context ends.

    No module gives them out, but a function in the model's own file does. A model without it shows nothing.
    """
    home = sys.modules[type(model).__module__]
    if not hasattr(home, ROTATE):
        yield
        return
    plain = getattr(home, ROTATE)

    def rotate(*args: Any, **options: Any) -> Any:
        rotated = plain(*args, **options)
        if isinstance(rotated, tuple):
            for heads in rotated:
                see(heads.transpose(1, 2))
        return rotated

    setattr(home, ROTATE, rotate)
    try:
        yield
    finally:
        setattr(home, ROTATE, plain)
