"""Writing byte by byte, with a byte model of any kind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.trace import Trace

END = 256
"""The symbol after the 256 bytes: the text ends."""


class ByteModel(Protocol):
    """What reads and writes bytes: `ByteLM`, or a `ByteEnsemble` of several.

    `ends` says whether it gives the end of a text a probability, `room` how many bytes surely fit its context
    (negative: the text so far does not), `passes` counts forward passes, and `parts` is what each member of an
    ensemble said when last asked, float64 [members, 257].
    """

    @property
    def passes(self) -> int: ...

    @property
    def parts(self) -> Tensor: ...

    @property
    def ends(self) -> bool: ...

    @property
    def room(self) -> int: ...

    def start(self, prompt: bytes | str = b"", prefix_ids: Sequence[Sequence[int]] | None = None) -> None: ...

    def next_byte(self) -> Tensor: ...

    def advance(self, byte: int) -> None: ...

    def log_probs(self, data: bytes | str) -> NDArray[np.float64]: ...


@dataclass
class ByteGeneration:
    """Bytes that were written.

    Attributes:
        data: the new bytes.
        finish_reason: "stop", "length" or "context".
        log_probs: of each byte under the byte model, untempered, in nats.
        entropies: in bits.
        parts: of an ensemble, each member's log-probability of each byte.
        passes: forward passes for them, all members' together.
        seconds: wall time.
    """

    data: bytes = b""
    finish_reason: str = "length"
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)
    passes: int = 0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    def trace(self, names: Sequence[str] = ()) -> Trace:
        """One entry a byte; a character of several bytes stands at its last.

        Args:
            names: of an ensemble's members, for a channel each.
        """
        shown, begun = [], 0
        for end in range(1, len(self.data) + 1):
            piece = self.data[begun:end].decode(errors="replace")
            whole = "\ufffd" not in piece or end - begun >= 4 or end == len(self.data)
            shown.append(piece if whole else "")
            begun = end if whole else begun
        trace = Trace(shown)
        trace.add("probability", [math.exp(x) for x in self.log_probs], "of the byte", 0, 1)
        trace.add("entropy", self.entropies, "of the next byte, in bits", 0)
        for number, name in enumerate(names):
            own = [math.exp(row[number]) for row in self.parts]
            trace.add(name, own, f"probability of the byte under {name} alone", 0, 1)
        if len(names) > 1:
            surest = [names[int(np.argmax(row))] for row in self.parts]
            trace.add("surest", surest, "the model that gave the byte the most")
        trace.meta |= {"finish_reason": self.finish_reason, "passes": self.passes, "seconds": self.seconds}
        return trace


def write(
    model: ByteModel,
    max_new_bytes: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    on_bytes: Callable[[bytes], None] | None = None,
) -> ByteGeneration:
    """Write on from where a byte model stands: to the end of the text or of the context, or `max_new_bytes`.

    Args:
        sampling: of bytes: temperature and cut-offs apply to their distribution, not to that of tokens. By default
            greedy.
        on_bytes: called with each byte as it is written, to stream it.

    Raises:
        InputError: `max_new_bytes` below 1.
    """
    if max_new_bytes < 1:
        raise InputError(f"max_new_bytes: {max_new_bytes} is not at least 1")
    chosen = sampling or Sampling()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found, begun, before = ByteGeneration(), time.perf_counter(), model.passes
    for _ in range(max_new_bytes):
        if model.room < 0:
            found.finish_reason = "context"
            break
        logs = model.next_byte()
        byte = chosen.draw(logs, generator)
        if byte == END:
            found.finish_reason = "stop"
            break
        found.entropies.append(float(-(logs.exp() * logs.clamp(min=-1e4)).sum() / math.log(2)))
        found.log_probs.append(float(logs[byte]))
        if len(model.parts):
            found.parts.append(model.parts[:, byte].tolist())
        found.data += bytes([byte])
        model.advance(byte)
        if on_bytes is not None:
            on_bytes(bytes([byte]))
    found.seconds, found.passes = time.perf_counter() - begun, model.passes - before
    return found


class Writer:
    """`generate` for byte models."""

    def generate(
        self: ByteModel,
        prompt: bytes | str = b"",
        max_new_bytes: int = 128,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prefix_ids: Sequence[Sequence[int]] | None = None,
        on_bytes: Callable[[bytes], None] | None = None,
    ) -> ByteGeneration:
        """Continue a prompt byte by byte: `start`, then `write`."""
        self.start(prompt, prefix_ids)
        return write(self, max_new_bytes, sampling, seed, on_bytes)
