"""The real SmolLM2, fetched and converted by `load` on first use: its weights and its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenworks.core.convert import whole
from tokenworks.core.models import LoadedModel, load

pytestmark = pytest.mark.model


@pytest.fixture(scope="session")
def smollm() -> LoadedModel:
    return load("smollm2-135m")


def test_smollm_has_the_logits_of_its_gguf_file(smollm: LoadedModel) -> None:
    assert smollm.gguf_path is not None
    own = AutoModelForCausalLM.from_pretrained(
        smollm.gguf_path.parent, gguf_file=smollm.gguf_path.name, dtype=torch.float32
    )
    ids = smollm.tokenizer("Tokens: 1, 2 and 3.\n\n4 and on. " * 4, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(smollm.model(ids).logits, own(ids).logits)


def test_smollm_tokenizer_is_the_published_one(smollm: LoadedModel) -> None:
    tokenizer = smollm.tokenizer
    pieces = ["x", "1", "Ġ", "1", "2", "Ġ", "3", ".", "1", "4", "ĊĊ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("x1 12 3.14\n\n2024") == pieces
    for text in ("x1 12 3.14\n\n2024 ab", " two  spaces , and n't !", "héllo 世界 😀\t\r\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("hi").input_ids == [6004], "no <|im_start|> is put before a text"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 8192)
    assert tokenizer.decode([1, 6004, 2], skip_special_tokens=True) == "hi"
    assert smollm.instruction_tuned
    assert smollm.gguf_path is not None
    usual = AutoTokenizer.from_pretrained(smollm.gguf_path.parent)
    assert usual.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (usual.special_tokens_map, usual.padding_side) == (tokenizer.special_tokens_map, tokenizer.padding_side)


def test_smollm_answers_and_stops(smollm: LoadedModel) -> None:
    prompt: Any = smollm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model: Any = smollm.model
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    assert str(smollm.tokenizer.decode(answer)).endswith("The capital of France is Paris.<|im_end|>")
    assert smollm.model.generation_config.eos_token_id == [2, 0]
    assert smollm.gguf_path is not None
    assert whole(smollm.gguf_path.parent)
