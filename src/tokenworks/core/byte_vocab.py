"""ByteVocab: which bytes each token of a vocabulary stands for.

`decode([id])` cannot say: it drops leading blanks and replaces a part of a character by U+FFFD.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenworks.core.errors import InputError

PROBE = "Hi there,  it's 2x5\n\n\tnaïve 漢字 🙂 end \n"
"""What a tokenizer must give back unchanged to be read as bytes."""


@dataclass(frozen=True)
class ByteVocab:
    """The bytes of every token id.

    Args:
        pieces: for each id its bytes; None for control tokens (begin, end, padding, ...), which are no text.
    """

    pieces: tuple[bytes | None, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> ByteVocab:
        """Of a byte-level BPE, or of a SentencePiece BPE with byte fallback.

        Args:
            size: V, the width of the model's logits; ids that the tokenizer does not know are control tokens.

        Raises:
            InputError: the tokenizer is of another kind, or changes the text (lower case, NFKC, added blanks).
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError("tokenizer: not a fast tokenizer; load it with `use_fast=True`")
        facts = json.loads(backend.to_str())
        byte_level = "ByteLevel" in json.dumps(facts["decoder"])
        special = {added["id"]: added for added in facts["added_tokens"]}
        known: dict[str, int] = tokenizer.get_vocab()
        pieces: list[bytes | None] = [None] * max(size or 0, max(known.values()) + 1)
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        for text, token in known.items():
            added: Any = special.get(token)
            if added is not None:
                pieces[token] = None if added["special"] else text.replace("▁", " ").encode()
            elif byte_level:
                pieces[token] = bytes(to_byte[c] for c in text) if all(c in to_byte for c in text) else None
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                pieces[token] = bytes([int(text[3:5], 16)])
            else:
                pieces[token] = text.replace("▁", " ").encode()
        found = cls(tuple(pieces))
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if any(found.pieces[token] is None for token in ids) or found.join(ids) != PROBE.encode():
            raise InputError(
                "tokenizer: its tokens do not spell the text they came from (it adds or removes blanks, or "
                "changes letters), so it cannot be read as bytes; use a byte-level BPE such as SmolLM2's"
            )
        return found

    def __len__(self) -> int:
        return len(self.pieces)

    def join(self, tokens: Any) -> bytes:
        """The bytes that a sequence of ids spells; control tokens spell nothing."""
        return b"".join(self.pieces[int(token)] or b"" for token in tokens)

    @cached_property
    def text_ids(self) -> NDArray[np.int64]:
        """The ids that are text, int64 [n], ascending."""
        return np.array([token for token, piece in enumerate(self.pieces) if piece], dtype=np.int64)
