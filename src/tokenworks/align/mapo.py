"""MaPO: SparsePO's mask without parameters, from what the reference's layers do at each token (arXiv 2410.05102).

Of every site in the network the mean over its channels is rescaled over the response to [0, 1]; sites are averaged
within their kind, and the kinds with each other. (The paper also takes z-scores before it rescales, which the
rescaling undoes.) The mask is dense, and looks at the whole response: it is data, not a prediction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenworks.core.errors import InputError, UnsupportedModelError

KINDS = {
    "mlp": ("act_fn", "act"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj", "query_key_value", "dense"),
    "residual": (
        "input_layernorm",
        "post_attention_layernorm",
        "ln_1",
        "ln_2",
        "norm",
        "ln_f",
        "mlp",
        "embed_tokens",
    ),
}
"""Kinds of sites, and the names under which models keep the modules whose results are looked at."""


def activation_scores(
    reference: PreTrainedModel, kinds: Sequence[str] = tuple(KINDS)
) -> Callable[[Sequence[int], Sequence[int]], list[float]]:
    """A scorer that gives each token of a response its mask, in [0, 1].

    Args:
        kinds: of `KINDS`.

    Raises:
        InputError: no such kind.
        UnsupportedModelError: the model has no site of a kind under a known name.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise InputError(f"kinds: no {', '.join(sorted(unknown)) or 'kind given'}; there are {', '.join(KINDS)}")
    sites = {kind: [m for name, m in reference.named_modules() if name.rsplit(".", 1)[-1] in KINDS[kind]]
             for kind in kinds}  # fmt: skip
    for kind, found in sites.items():
        if not found:
            raise UnsupportedModelError(
                f"reference: {type(reference).__name__} has no {kind} module under a known name "
                f"({', '.join(KINDS[kind])}); leave the kind out"
            )

    @torch.inference_mode()
    def score(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        # The state that predicts a token is the one before it.
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        ids = torch.tensor([[*prompt, *response]], device=reference.device)
        means: dict[str, list[Tensor]] = defaultdict(list)
        with _watching(
            sites, lambda kind, value: means[kind].append(_rescaled(value[0, places].float().mean(-1)))
        ):
            reference.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
        kept: list[float] = torch.stack([torch.stack(means[kind]).mean(0) for kind in kinds]).mean(0).tolist()
        return kept

    return score


def _rescaled(values: Tensor) -> Tensor:
    """To [0, 1] over the tokens; 1 everywhere if they are all the same, so that no token is left out for it."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.ones_like(values)


@contextmanager
def _watching(sites: dict[str, list[nn.Module]], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand every site's result [1, S, channels] to `see`, as long as the context lasts, also if it ends by an error."""

    def hook(kind: str) -> Any:
        def keep(_: nn.Module, __: Any, result: Any) -> None:
            see(kind, result[0] if isinstance(result, tuple) else result)

        return keep

    handles = [site.register_forward_hook(hook(kind)) for kind, found in sites.items() for site in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
