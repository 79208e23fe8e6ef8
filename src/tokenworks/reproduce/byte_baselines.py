"""What else one would do with a prompt that ends inside a token: continue its encoding, or heal its last token."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tokenworks.core.session import Session
from tokenworks.decode.byte_level import ByteLM, beginning

Floats = NDArray[np.float64]


class Baselines:
    """Next bytes and completions by tokens.

    Args:
        reader: of the same model; its tables of tokens are used, its session is not.
        session: of its own.
    """

    def __init__(self, reader: ByteLM, session: Session, tokenizer: object) -> None:
        self.session, self.spelling, self.encodings = session, reader.cover.spelling, reader.encodings
        self.pieces = reader.encodings.vocabulary.pieces
        self._prefix = beginning(tokenizer)  # type: ignore[arg-type]

    def naive(self, prompt: str) -> Floats:
        """P(next byte) after enc(prompt), by the first byte of the next token: float64 [256]."""
        self.session.rollback(0)
        return self._first_bytes(self.session.prefill([*self._prefix, *self.encodings.encode(prompt)]))

    def healing(self, prompt: str) -> Floats:
        """The same, with the last token dropped and the next one made to begin with what it spelled."""
        *ids, last = self.encodings.encode(prompt)
        dropped = self.pieces[last] or b""
        self.session.rollback(0)
        sums = self._sums(self.session.prefill([*self._prefix, *ids]))
        low, high = self.spelling.beyond(dropped)
        longer = np.diff(sums[self.spelling.split(low, high, len(dropped))])
        after = self._first_bytes(self.session.prefill([last]))
        place = int(np.flatnonzero(self.spelling.order == last)[0])
        total = longer + (sums[place + 1] - sums[place]) * after
        return np.asarray(total / total.sum())

    def complete(self, prompt: str, limit: int, heal: bool = False) -> bytes:
        """Up to a line break, the end of the text or `limit` bytes, greedily token by token."""
        ids, dropped = self.encodings.encode(prompt), b""
        if heal:
            dropped = self.pieces[ids.pop()] or b""
        self.session.rollback(0)
        logits = self.session.prefill([*self._prefix, *ids])
        written = b""
        while len(written) < limit + len(dropped) and b"\n" not in written[len(dropped) :]:
            if not written and dropped:
                fitting = [t for t in self.spelling.order.tolist() if (self.pieces[t] or b"").startswith(dropped)]
                token = fitting[int(logits[fitting].argmax())]
            else:
                token = int(logits.argmax())
            if self.pieces[token] is None:
                break
            written += self.pieces[token] or b""
            logits = self.session.prefill([token])
        return written[len(dropped) :].partition(b"\n")[0][:limit]

    def _sums(self, logits: torch.Tensor) -> Floats:
        p = torch.softmax(logits.double(), -1).numpy()[self.spelling.order]
        return np.concatenate([[0.0], np.cumsum(p / p.sum())])

    def _first_bytes(self, logits: torch.Tensor) -> Floats:
        sums = self._sums(logits)
        return np.asarray(np.diff(sums[self.spelling.split(0, len(self.spelling), 0)]))


def complete_bytes(reader: ByteLM, prompt: str, limit: int) -> bytes:
    """As `Baselines.complete`, by the byte model."""
    reader.start(prompt)
    written = b""
    while len(written) < limit:
        byte = int(reader.next_byte().argmax())
        if byte > 255 or byte == ord("\n"):
            break
        written += bytes([byte])
        reader.advance(byte)
    return written
