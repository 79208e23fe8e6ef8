"""Python's documentation as a corpus, and the small tokenizers trained on it."""

from __future__ import annotations

import pytest
import torch

from tokenworks.core.corpus import pack, python_docs, train_bpe, windows
from tokenworks.core.errors import InputError


def test_the_splits_share_nothing_and_are_large_enough() -> None:
    train, test = python_docs("train"), python_docs("test")
    assert not set(train) & set(test)
    assert sum(map(len, train)) > 1_000_000
    assert sum(map(len, test)) > 20_000
    assert any("with" in text and "statement" in text for text in train)
    with pytest.raises(InputError, match="split: there is no 'dev'"):
        python_docs("dev")


def test_a_tokenizer_gives_back_every_text() -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 5, 300, ["<pad>", "<mask>"])
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<mask>"]) == [0, 1]
    for text in ("the cat", "naïve\n\n\t日本 🙂", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(InputError, match="vocab_size: 256 cannot hold"):
        train_bpe(["x"], 256, ["<pad>"])


def test_texts_are_packed_and_windows_lie_within_them() -> None:
    tokenizer = train_bpe(["some words"], 300, ["<end>"])
    stream = pack(["some", "words"], tokenizer, 0)
    assert tokenizer.decode(stream) == "some<end>words<end>"
    found = windows(torch.arange(50), 200, 8, torch.Generator().manual_seed(0))
    assert found.shape == (200, 8)
    assert (found - found[:, :1]).equal(torch.arange(8).expand(200, -1))
    assert found.equal(windows(torch.arange(50), 200, 8, torch.Generator().manual_seed(0)))
