"""From prompts to ids: chat templates, raw text, and the tokens that end an answer."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import tiny_model
from tests.core.test_trace import byte_tokenizer
from tokenworks.core.errors import InputError
from tokenworks.core.text import encode_prompt, one_prompt, stop_ids

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def test_a_chat_template_is_used_unless_raw() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "hi"
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "<user>hi<a>"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", raw=True)) == "hi"
    with pytest.raises(InputError, match="prompt: empty"):
        encode_prompt(tokenizer, " ")
    with pytest.raises(InputError, match="prompt: empty"):
        encode_prompt(tokenizer, "", raw=True)


def test_stop_tokens_come_from_the_model_then_from_the_tokenizer() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == []
    tokenizer.eos_token = "a"
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = 5
    assert stop_ids(model, tokenizer) == [5]
    model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(model, tokenizer) == [5, 6]


def test_one_prompt_and_no_more() -> None:
    assert one_prompt(torch.tensor([[3, 4]]), 2) == [3, 4]
    for prompt, said in (
        ([], "empty"),
        (torch.zeros(2, 3, dtype=torch.long), "a batch of 2"),
        ([1, 2, 3], "3 tokens"),
    ):
        with pytest.raises(InputError, match=said):
            one_prompt(prompt, 2)
