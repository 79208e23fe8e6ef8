"""Spelling: a vocabulary in the order of its bytes, and which bytes UTF-8 allows next."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenworks.core.byte_vocab import ByteVocab


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
        return low, bisect_left(self._pieces, beginning + b"\xff" * self.longest, lo=low)

    def split(self, low: int, high: int, depth: int) -> NDArray[np.int64]:
        """Where, within [low, high), each next byte begins: int64 [257]."""
        return low + np.searchsorted(self._letters[depth, low:high], _BOUNDS)


_BOUNDS = np.arange(257, dtype=np.int16)


@lru_cache(maxsize=4096)
def legal_next(rest: bytes) -> NDArray[np.bool_]:
    """Which bytes UTF-8 allows after the unfinished character `rest` (empty: none is unfinished): bool [256]."""
    allowed = np.zeros(256, dtype=bool)
    for byte in range(256):
        try:
            codecs.getincrementaldecoder("utf-8")().decode(rest + bytes([byte]))
        except UnicodeDecodeError:
            continue
        allowed[byte] = True
    return allowed


def unfinished(data: bytes) -> bytes:
    """The bytes of a character that `data` ends inside of; empty if it ends with a whole one."""
    for length in range(1, min(4, len(data) + 1)):
        if data[-length] >= 0xC0:
            return data[-length:] if missing(data[-length:]) else b""
        if data[-length] < 0x80:
            break
    return b""


def missing(rest: bytes) -> int:
    """Bytes that the unfinished character `rest` still needs; 0 if it can be none."""
    first = rest[0]
    need = 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0
    return max(0, need - len(rest))
