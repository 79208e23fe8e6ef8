"""Text a model writes itself: its own states, the template's tokens, and seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.selftext import OPENINGS, SelfText, write_text

CHAT = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_bpe(list(OPENINGS), 300, ["<u>", "</u>", "<a>", "<eos>"])
    made.eos_token = "<eos>"
    return made


@torch.no_grad()
def test_states_are_the_models_own_and_greedy_rows_are_greedy(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama", vocab_size=300)
    text = write_text(model, tokenizer, length=40, seed=1, rows=4)
    logits = model(input_ids=text.tokens).logits
    assert torch.allclose(text.states.float() @ model.lm_head.weight.T, logits, atol=0.05, rtol=0.01)
    # Without a chat template rows go on from their opening; row 0 and 3 are written at temperature 0.
    for row in (0, 3):
        free = text.free[row].nonzero().flatten()
        assert torch.equal(text.tokens[row, free], logits[row, free - 1].argmax(-1))
    again = write_text(model, tokenizer, length=40, seed=1, rows=4)
    assert torch.equal(again.tokens, text.tokens)
    assert not torch.equal(write_text(model, tokenizer, length=40, seed=2, rows=4).tokens, text.tokens)


def test_a_chat_model_writes_both_sides(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT
    text = write_text(tiny_model("llama", vocab_size=300), tokenizer, length=120, rows=4)
    start, end, answer = tokenizer.convert_tokens_to_ids(["<u>", "</u>", "<a>"])
    assert bool((text.tokens[:, 0] == start).all())
    assert not text.free[:, 0].any()
    for row in text.tokens.tolist():
        assert answer in row, "a request that goes on for too long is cut off"
        assert row[row.index(answer) - 1] == end
    text.save(tmp_path / "text.safetensors")
    again = SelfText.load(tmp_path / "text.safetensors")
    assert torch.equal(again.states, text.states)
