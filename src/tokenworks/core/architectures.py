"""Which models can run token trees, and how that is found out."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokenworks.core.errors import UnsupportedModelError
from tokenworks.core.tree import ROOT, TokenTree

if TYPE_CHECKING:
    from tokenworks.core.session import Session

PROVED = frozenset({"llama", "gemma3_text", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "mistral", "gemma2"})
"""Architectures whose tree attention the tests prove; any other is checked on its own when first used."""


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError`, naming the architecture, if token trees cannot run on it."""
    config = model.config
    layers = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or [])
    reason = None
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder; tokenworks decodes with decoder-only models"
    elif getattr(model, "_is_stateful", False) or layers - {"full_attention", "sliding_attention"}:
        reason = "its layers carry a recurrent or chunked state, which cannot branch into a token tree"
    elif model.get_output_embeddings() is None:
        reason = "it has no language-modelling head; load it with AutoModelForCausalLM"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its attention takes no mask from outside (ALiBi, or code of an older style)"
    if reason:
        raise UnsupportedModelError(f"model: {type(model).__name__} is not supported: {reason}.")


def cache_argument(module: nn.Module) -> str:
    """What the `forward` of a Transformers model calls its cache; version 5.24 renamed it in its own models."""
    return "cache" if "cache" in signature(module.forward).parameters else "past_key_values"


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The window of the layers that have one; None if every layer sees the whole context."""
    layers = getattr(config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def prove_trees(session: Session) -> None:
    """Compare a small tree with the model's own forward passes over two of its paths.

    Raises:
        UnsupportedModelError: the logits differ, or the model cannot run the tree at all.
    """
    ids = torch.arange(1, 6) % session.vocab_size
    try:
        tree = session.extend(TokenTree.of(ids, [ROOT, 0, 0, 2, 1]))
        gap = max(_gap(session, ids[path], tree[path[-1]]) for path in ([0, 2, 3], [0, 1, 4]))
    except (NotImplementedError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise _unproved(session, str(error)) from error
    finally:
        session.rollback()
    # Half precision rounds differently in one pass over a tree than in one over a chain.
    if not gap <= (1e-3 if session.model.dtype == torch.float32 else 5e-2):
        raise _unproved(session, f"they differ by {gap:.1e}")


@torch.inference_mode()
def _gap(session: Session, path_ids: torch.Tensor, tree_logits: torch.Tensor) -> float:
    own = session.model(input_ids=path_ids[None].to(session.model.device)).logits[0, -1].float()
    return float((own - tree_logits).abs().max() / own.abs().max().clamp(min=1))


def _unproved(session: Session, cause: str) -> UnsupportedModelError:
    name = type(session.model).__name__
    return UnsupportedModelError(f"model: {name} does not give a token tree the logits of its paths ({cause}).")
