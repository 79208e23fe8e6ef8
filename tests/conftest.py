"""Tiny random-weight models of every architecture whose tree attention is proved, and the cached SmolLM2."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_LIKE = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
CONFIGS = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 8},
    # A window of 6 makes most of the random trees reach past it.
    "gemma3_text": LLAMA_LIKE
    | {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": LLAMA_LIKE | {"head_dim": 8, "sliding_window": 6},
    "gemma2": LLAMA_LIKE | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": SMALL | {"intermediate_size": 48, "max_position_embeddings": 128},
    "opt": SMALL | {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
}


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model with spread-out logits, so that an argmax is no accident of rounding."""
    torch.manual_seed(seed)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **(CONFIGS[kind] | special | changes))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
            )
    return model


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    return tiny_model("llama")
