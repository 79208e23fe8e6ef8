"""Encodings: which token sequences the encoding of some text begins with.

A tokenizer maps every text to one sequence, so a model's probability lies on the sequences that are encodings.
The beginning of an encoding need not be one: "\\n\\n" is one token of many tokenizers, but in "\\n\\nx" it is two.
What may stand there depends on what comes next, so a sequence is tried with a few futures.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tokenworks.core.byte_vocab import ByteVocab
from tokenworks.core.errors import InputError

FUTURES = ("", "a", " ", "1", ".", "\n")
"""What may come next, one of each kind that the patterns of pre-tokenizers tell apart."""

NEIGHBOURHOOD = 4
"""Tokens before a place that decide what may follow. Merges and patterns do not reach further back."""

CONTINUATIONS = (0x80, 0x83, 0x8C, 0x91, 0x99, 0xA3, 0xA9, 0xB4, 0xBF)
"""Some bytes that an unfinished character may go on with."""


class Encodings:
    """The encodings of one tokenizer.

    Args:
        tokenizer: a fast one, of the kinds that `ByteVocab` reads.
        size: V, the width of the model's logits.

    Raises:
        InputError: as `ByteVocab.from_tokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self.vocabulary = ByteVocab.from_tokenizer(tokenizer, size)
        # A copy, so that text such as "<|im_end|>" is read as text and not as the control token.
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def lefts(self, data: bytes) -> list[tuple[int, ...]]:
        """Every sequence that spells `data` exactly and that an encoding begins with.

        Raises:
            InputError: the tokenizer cannot spell the text.
        """
        found: dict[tuple[int, ...], None] = {}
        for text in self._with_futures(data):
            left, spelled = [], 0
            for token in self.encode(text):
                if spelled >= len(data):
                    break
                left.append(token)
                spelled += len(self.vocabulary.pieces[token] or b"")
            if self.vocabulary.join(left) == data:
                found[tuple(left)] = None
            elif spelled <= len(data) or not self.vocabulary.join(left).startswith(data):
                raise InputError(
                    f"text: the tokenizer does not spell {text[-40:]!r} byte by byte (it changes some character)"
                )
        return list(found)

    def whole(self, data: bytes, left: Sequence[int]) -> bool:
        """Whether `left` is the encoding of `data`, so that the text may end there."""
        try:
            return self.encode(data.decode()) == list(left)
        except UnicodeDecodeError:
            return False

    def may_follow(self, left: Sequence[int], candidates: Sequence[int]) -> NDArray[np.bool_]:
        """For each candidate, whether an encoding begins with `left` and then it: bool [n]."""
        near = self._near(left)
        before = self.vocabulary.join(near)
        allowed = np.zeros(len(candidates), dtype=bool)
        texts: list[str] = []
        owners: list[int] = []
        for index, token in enumerate(candidates):
            piece = self.vocabulary.pieces[token]
            if piece is None:
                continue
            text = before + piece
            if text[-1:].isspace() or text[-1] >= 0x80:
                some = self._with_futures(text)
            else:
                some = [text.decode(errors="replace")]
            texts += some
            owners += [index] * len(some)
        length = len(near)
        for index, encoding in zip(
            owners, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            if not allowed[index]:
                ids = encoding.ids
                allowed[index] = ids[length : length + 1] == [candidates[index]] and ids[:length] == near
        return allowed

    def _near(self, left: Sequence[int]) -> list[int]:
        """The last tokens of `left`, if they stand by themselves as they do in it; else all of it."""
        near = list(left[-NEIGHBOURHOOD:])
        for text in self._with_futures(self.vocabulary.join(near)):
            if self.encode(text)[: len(near)] == near:
                return near
        return list(left)

    @staticmethod
    def _with_futures(data: bytes) -> list[str]:
        """Texts that begin with `data`: with the futures if it is whole characters, else with some completions."""
        try:
            text = data.decode()
            return [text + future for future in FUTURES]
        except UnicodeDecodeError as error:
            missing = _missing(data[error.start :])
        tails = [b""]
        for _ in range(missing):
            tails = [tail + bytes([c]) for tail in tails for c in CONTINUATIONS]
        found = []
        for tail in tails:
            try:
                found.append((data + tail).decode())
            except UnicodeDecodeError:
                continue
        return found


def _missing(rest: bytes) -> int:
    """Bytes that the unfinished character `rest` still needs; 0 if it can be none."""
    first = rest[0]
    need = 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0
    return max(0, need - len(rest))


class Spelling:
    """The vocabulary in the order of its bytes, so that tokens with a common beginning are neighbours."""

    def __init__(self, vocabulary: ByteVocab) -> None:
        text = vocabulary.text_ids.tolist()
        self.order: NDArray[np.int64] = np.array(sorted(text, key=lambda t: vocabulary.pieces[t] or b""))
        """int64 [n]: ids in order."""
        self._pieces = [vocabulary.pieces[token] or b"" for token in self.order]

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._pieces))

    @cached_property
    def _letters(self) -> NDArray[np.int16]:
        """int16 [longest, n]: the bytes at each depth, -1 behind the end."""
        letters = np.full((self.longest, len(self)), -1, dtype=np.int16)
        for index, piece in enumerate(self._pieces):
            letters[: len(piece), index] = np.frombuffer(piece, dtype=np.uint8)
        return letters

    def beyond(self, beginning: bytes) -> tuple[int, int]:
        """The tokens that begin so and go on: places [low, high)."""
        low = bisect_left(self._pieces, beginning + b"\0")
        return low, bisect_left(self._pieces, beginning + b"\xff" * self.longest, lo=low) if low < len(
            self
        ) else low

    def split(self, low: int, high: int, depth: int) -> NDArray[np.int64]:
        """Where, within [low, high), each next byte begins: int64 [257]."""
        return low + np.searchsorted(self._letters[depth, low:high], np.arange(257))
