"""Byte-level (arXiv 2410.09303): the byte model that a tokenized model is, exactly and without training.

    reader = ByteLM(Session(model), tokenizer)
    reader.start("some text")                         # it may end inside a token
    reader.log_probs(b" more")                        # of each byte
    reader.generate("def fibon", max_new_bytes=40)

The probability that a text begins with x is the sum over its *cover*: the token sequences that an encoding can
begin with, that spell x, and whose last token is the one that reaches its end. Continuing enc(x) alone, as is
usual, takes one member for all of them; that is the bias which makes models stumble over prompts that end inside
a token. `decode.byte_cover` keeps the cover.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.session import Engine
from tokenworks.decode.byte_cover import Cover
from tokenworks.decode.byte_ensemble import ByteEnsemble
from tokenworks.decode.byte_prompts import beginning, chat_prefixes, checked_text, infilling_ids
from tokenworks.decode.byte_writing import END, ByteGeneration, ByteModel, Writer, write
from tokenworks.decode.encodings import Encodings
from tokenworks.decode.spelling import unfinished

__all__ = [
    "END",
    "ByteEnsemble",
    "ByteGeneration",
    "ByteLM",
    "ByteModel",
    "beginning",
    "chat_prefixes",
    "checked_text",
    "infilling_ids",
    "write",
]

TOLERANCE = 1e-2
"""Probability that may go unchecked: the tokens that hold the rest are tried in an encoding one by one. Of what is
not tried some hundredths are not valid, so that a likely text's next byte is off by some ten-thousandths. It is no
bound: after a text that the model finds very improbable, more of what is left may be invalid."""


class ByteLM(Writer):
    """A tokenized model as a model of bytes.

    What may follow a sequence is what some encoding goes on with; the model's probability of everything else (and
    of control tokens that do not end the text) is taken away and the rest made to sum to 1, token by token.

    Args:
        session: the model's.
        tokenizer: its own; byte-level BPE, or SentencePiece BPE with byte fallback.
        stop_ids: tokens that end a text; by default the tokenizer's end of text.
        tolerance: in [0, 1); 0 tries every token and runs every row, at seconds a byte.

    Attributes:
        encodings: of the tokenizer.

    Raises:
        InputError: a tokenizer that changes text, or a number out of range.
    """

    parts = torch.empty(0)
    """It has no members."""

    def __init__(
        self,
        session: Engine,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int] | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance: {tolerance} is not in [0, 1)")
        end = tokenizer.eos_token_id
        self._stops = list(stop_ids) if stop_ids is not None else [] if end is None else [end]
        if any(not 0 <= token < session.vocab_size for token in self._stops):
            raise InputError(f"stop_ids: {self._stops} are not ids from 0 to {session.vocab_size - 1}")
        self.encodings = Encodings(tokenizer, session.vocab_size)
        self.cover = Cover(session, self.encodings, self._stops, tolerance)
        self._default_prefix = beginning(tokenizer)

    @property
    def data(self) -> bytes:
        """The prompt and what was written or read since `start`."""
        return self.cover.data

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self.cover.passes

    @property
    def ends(self) -> bool:
        """Whether some token ends a text."""
        return bool(self._stops)

    @property
    def room(self) -> int:
        """Bytes that surely fit the context: no encoding grows by more than a token a byte."""
        return self.cover.room

    @torch.inference_mode()
    def start(self, prompt: bytes | str = b"", prefix_ids: Sequence[Sequence[int]] | None = None) -> None:
        """Begin a text.

        Args:
            prompt: the text so far, in UTF-8; it may end inside a token or a character.
            prefix_ids: what stands before the text as token ids, such as a chat template: one sequence (in an
                ensemble one a model). By default what begins a text for this model.

        Raises:
            InputError: bytes that no text in UTF-8 begins with, no known beginning of a text, or a prompt that
                does not fit the context.
        """
        data = checked_text(prompt)
        if prefix_ids is not None and len(prefix_ids) != 1:
            raise InputError(f"prefix_ids: {len(prefix_ids)} sequences for 1 models")
        prefix = list(prefix_ids[0]) if prefix_ids is not None else self._default_prefix
        if not prefix:
            raise InputError(
                "prefix_ids: this tokenizer has no token that begins a text, and the first token of one cannot be "
                "given a probability without; name the ids that stand before the text"
            )
        self.cover.start(data, prefix)

    @torch.inference_mode()
    def next_byte(self) -> Tensor:
        """Log-probabilities of the next byte, and of the end at `END`: float64 [257]."""
        return self.cover.next_byte()

    def advance(self, byte: int) -> None:
        """Take a byte as written. Nothing is run before the next byte is asked for.

        Raises:
            InputError: no text in UTF-8 goes on with it.
        """
        if not 0 <= byte < END:
            raise InputError(f"byte: {byte} is not in 0..255")
        checked_text(bytes([byte]), unfinished(self.data), "byte")
        self.cover.advance(byte)

    @torch.inference_mode()
    def log_probs(self, data: bytes | str) -> NDArray[np.float64]:
        """Of each byte given those before it, going on from the text so far, in nats: float64 [n].

        Raises:
            InputError: bytes that no text in UTF-8 goes on with, or that do not fit the context.
        """
        return np.diff(self.cover.read(checked_text(data, unfinished(self.data), "data")))
