"""The bytes of tokens: they spell every text, also where a token holds a part of a character."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenworks.core.byte_vocab import ByteVocab
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.models import load

TEXTS = ["plain words", "  two  blanks\n\n\ttab", "é漢字🙂 ﬁ", "x=1234;\r\n", "▁ is a character too"]


@pytest.mark.parametrize("text", TEXTS[:4])
def test_pieces_spell_the_text(text: str) -> None:
    tokenizer = train_bpe(["some words to learn merges from, words to learn"], 300, special=["<end>"])
    vocabulary = ByteVocab.from_tokenizer(tokenizer)
    assert vocabulary.join(tokenizer(text)["input_ids"]) == text.encode()
    assert vocabulary.pieces[0] is None


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2(text: str) -> None:
    tokenizer = load("smollm2-135m").tokenizer
    vocabulary = ByteVocab.from_tokenizer(tokenizer, 49152)
    assert len(vocabulary) == 49152
    assert vocabulary.join(tokenizer(text)["input_ids"]) == text.encode()
    assert all(vocabulary.pieces[token] is None for token in tokenizer.all_special_ids)
    assert len(vocabulary.text_ids) == 49152 - 17


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"hi": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"tokenizer: .* do not spell the text"):
        ByteVocab.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
