"""Encodings: which token sequences the encoding of some text begins with.

A tokenizer maps every text to one sequence, so a model's probability lies on the sequences that are encodings.
The beginning of an encoding need not be one: "\\n\\n" is one token of many tokenizers, but in "\\n\\nx" it is two.
What may stand there depends on what comes next, so a sequence is tried with a few futures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tokenworks.core.byte_vocab import ByteVocab
from tokenworks.core.errors import InputError
from tokenworks.decode.spelling import missing

FUTURES = ("", "a", " ", "1", ".", "\n")
"""What may come next, one of each kind that the patterns of pre-tokenizers tell apart."""

NEIGHBOURHOOD = 4
"""Tokens before a place that decide what may follow. Merges and patterns do not reach further back."""

ANCHOR = re.compile(rb"[A-Za-z0-9](?= [A-Za-z])")
"""Before the blank of a new word every encoding has a boundary, unless some token reaches across."""

WORD_END, WORD = re.compile(rb"[A-Za-z0-9]\Z"), re.compile(rb" [A-Za-z]")
ACROSS = re.compile(rb"[A-Za-z0-9] ")

UNKNOWN = -1
REMEMBERED = 512
"""Ends of sequences of which it is remembered what may follow; a byte a token each."""

MEMO = 64
"""Frozen beginnings remembered; more than the longest token has words."""

CONTINUATIONS: dict[int, Sequence[int]] = {
    0: (),
    1: range(0x80, 0xC0),
    2: (0x80, 0x83, 0x8C, 0x91, 0x99, 0xA3, 0xA9, 0xB4, 0xBF),
    3: (0x80, 0x99, 0xBF),
}
"""By the bytes that an unfinished character still needs, what each may be: all, or some."""


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
        self._verdicts: dict[tuple[int, ...], NDArray[np.int8]] = {}
        """For the ends of sequences, what is known of each token: whether it may follow."""
        self._memo: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        """Frozen beginnings by their length: their bytes and tokens."""

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def lefts(self, data: bytes) -> list[tuple[int, ...]]:
        """Every sequence that spells `data` exactly and that an encoding begins with; `data` alone encoded first.

        Raises:
            InputError: the tokenizer cannot spell the text.
        """
        before, rest = self._frozen(data)
        found: dict[tuple[int, ...], None] = {}
        for text in _with_futures(rest):
            left, spelled = [], 0
            for token in self.encode(text):
                if spelled >= len(rest):
                    break
                left.append(token)
                spelled += len(self.vocabulary.pieces[token] or b"")
            joined = self.vocabulary.join(left)
            if joined == rest:
                found[before + tuple(left)] = None
            elif spelled <= len(rest) or not joined.startswith(rest):
                raise InputError(
                    f"text: the tokenizer does not spell {text[-40:]!r} byte by byte (it changes some character)"
                )
        return list(found)

    def whole(self, data: bytes, left: Sequence[int]) -> bool:
        """Whether `left` is the encoding of `data`, so that the text may end there."""
        before, rest = self._frozen(data)
        try:
            return before + tuple(self.encode(rest.decode())) == tuple(left)
        except UnicodeDecodeError:
            return False

    def _frozen(self, data: bytes) -> tuple[tuple[int, ...], bytes]:
        """Tokens up to the last place where every encoding has a boundary, and the bytes after it.

        Texts come one byte longer each, so what was frozen before is mostly gone on with.
        """
        cut = self._last_anchor(data)
        if cut == 0:
            return (), data
        known = max((c for c in self._memo if c <= cut and data.startswith(self._memo[c][0])), default=0)
        ids = self._memo[known][1] if known else ()
        if known < cut:
            ids += tuple(self.encode(data[known:cut].decode()))
            self._memo = {c: self._memo[c] for c in sorted(self._memo)[-MEMO:] if c <= known}
            self._memo[cut] = data[:cut], ids
        return ids, data[cut:]

    def _last_anchor(self, data: bytes) -> int:
        if self._reach_across:
            return 0
        # Most texts have one in their last bytes.
        for width in (128, len(data)):
            begin = max(0, len(data) - width)
            found = [match.end() for match in ANCHOR.finditer(data, begin)]
            if found:
                return found[-1]
        return 0

    @cached_property
    def _reach_across(self) -> bool:
        """Whether some token holds the end of one word and the blank after it."""
        return any(piece is not None and ACROSS.search(piece) for piece in self.vocabulary.pieces)

    def may_follow(self, left: Sequence[int], candidates: Sequence[int]) -> NDArray[np.bool_]:
        """For each candidate, whether an encoding begins with `left` and then it: bool [n]."""
        asked = np.asarray(candidates, dtype=np.int64)
        allowed = np.zeros(len(asked), dtype=bool)
        # Before a new word there is a boundary, so there the word alone decides.
        anchored = bool(left) and WORD_END.search(self.vocabulary.pieces[left[-1]] or b"") is not None
        alone = self._new_words[asked] & (anchored and not self._reach_across)
        for near, part in ((), alone), (tuple(self._near(left)), ~alone):
            allowed[part] = self._known_or_tried(near, asked[part])
        return allowed

    def _known_or_tried(self, near: tuple[int, ...], asked: NDArray[np.int64]) -> NDArray[np.bool_]:
        verdicts = self._verdicts.pop(near, None)
        if verdicts is None:
            verdicts = np.full(len(self.vocabulary), UNKNOWN, dtype=np.int8)
            if len(self._verdicts) >= REMEMBERED:
                del self._verdicts[next(iter(self._verdicts))]
        self._verdicts[near] = verdicts
        new = asked[verdicts[asked] == UNKNOWN]
        if len(new):
            verdicts[new] = self._tried(list(near), new.tolist())
        return verdicts[asked] == 1

    @cached_property
    def _new_words(self) -> NDArray[np.bool_]:
        """Which tokens are a blank and the beginning of a word, bool [V]."""
        return np.array([piece is not None and WORD.match(piece) is not None for piece in self.vocabulary.pieces])

    def _tried(self, near: list[int], candidates: list[int]) -> NDArray[np.bool_]:
        """As `may_follow`, by encoding texts that begin with `near` and each candidate."""
        before = self.vocabulary.join(near)
        allowed = np.zeros(len(candidates), dtype=bool)
        futures = {
            index: _with_futures(before + piece)
            for index, token in enumerate(candidates)
            if (piece := self.vocabulary.pieces[token]) is not None
        }
        # Most that may follow may do so before anything: the other futures are for the rest.
        for part in (slice(0, 1), slice(1, None)):
            tried = [
                (index, text) for index, texts in futures.items() if not allowed[index] for text in texts[part]
            ]
            encoded = self._tokenizer.encode_batch_fast([text for _, text in tried], add_special_tokens=False)
            for (index, _), encoding in zip(tried, encoded, strict=True):
                ids = encoding.ids
                if ids[len(near) : len(near) + 1] == [candidates[index]] and ids[: len(near)] == near:
                    allowed[index] = True
        return allowed

    def _near(self, left: Sequence[int]) -> list[int]:
        """The last tokens of `left`, if they stand by themselves as they do in it; else all of it.

        One is enough behind a letter: pairs decide what BPE merges, and patterns do not look back over it.
        """
        if left and _ends_with_letter(self.vocabulary.pieces[left[-1]] or b""):
            return [left[-1]]
        begin = max(0, len(left) - NEIGHBOURHOOD)
        while begin > 0 and _inside_character(self.vocabulary.pieces[left[begin]] or b""):
            begin -= 1
        near = list(left[begin:])
        for text in _with_futures(self.vocabulary.join(near)):
            if self.encode(text)[: len(near)] == near:
                return near
        return list(left)


def _ends_with_letter(piece: bytes) -> bool:
    try:
        return piece.decode()[-1:].isalpha()
    except UnicodeDecodeError:
        return False


def _with_futures(data: bytes) -> list[str]:
    """Texts that begin with `data`: if it is whole characters, itself and what may matter behind it; else some
    of the characters that it may become."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        absent = missing(data[error.start :])
    else:
        # Behind a letter or a digit nothing is decided by what follows.
        return [text] if text[-1:].isalnum() else [text + future for future in FUTURES]
    tails = [b""]
    for _ in range(absent):
        tails = [tail + bytes([c]) for tail in tails for c in CONTINUATIONS[absent]]
    found = []
    for tail in tails:
        try:
            found.append((data + tail).decode())
        except UnicodeDecodeError:
            continue
    return found


def _inside_character(piece: bytes) -> bool:
    return 0x80 <= piece[0] < 0xC0 if piece else False
