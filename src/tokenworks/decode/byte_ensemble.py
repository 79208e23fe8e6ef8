"""Ensembles of models with different tokenizers: what they have in common is the next byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.decode.byte_writing import ByteModel, Writer


class ByteEnsemble(Writer):
    """Several byte models as one: the mean of their next-byte distributions, whatever their tokenizers.

    Args:
        members: at least one; all give the end of a text a probability, or none does.
        weights: of the mean, one a member, none negative; equal by default.

    Raises:
        InputError: no members, weights that do not fit, or members that disagree on whether texts end.
    """

    def __init__(self, members: Sequence[ByteModel], weights: Sequence[float] | None = None) -> None:
        if not members:
            raise InputError("members: empty; give at least one byte model")
        chosen = [1.0] * len(members) if weights is None else list(weights)
        if len(chosen) != len(members) or not all(0 <= w < math.inf for w in chosen) or sum(chosen) <= 0:
            raise InputError(
                f"weights: {chosen} are not {len(members)} numbers from 0 upwards with a positive sum"
            )
        endless = [str(number) for number, member in enumerate(members) if not member.ends]
        if endless and len(endless) < len(members):
            raise InputError(
                f"members: number {', '.join(endless)} (from 0) has no token that ends a text, the others have: "
                "they would never agree to stop; give it `stop_ids`, or none to all"
            )
        self.members = list(members)
        self._logs = torch.tensor(chosen, dtype=torch.float64).log() - math.log(sum(chosen))
        self.parts: Tensor = torch.empty(0)
        """float64 [members, 257]: what each said of the next byte, when last asked."""
        self.read: Tensor = torch.empty(0)
        """float64 [members, n]: what each said of the bytes that `log_probs` read last."""

    @property
    def passes(self) -> int:
        """Forward passes of all members so far."""
        return sum(member.passes for member in self.members)

    @property
    def ends(self) -> bool:
        return self.members[0].ends

    @property
    def room(self) -> int:
        """Bytes that surely fit every member's context."""
        return min(member.room for member in self.members)

    def start(self, prompt: bytes | str = b"", prefix_ids: Sequence[Sequence[int]] | None = None) -> None:
        """As `ByteLM.start`, with one sequence of prefix ids a member."""
        if prefix_ids is not None and len(prefix_ids) != len(self.members):
            raise InputError(f"prefix_ids: {len(prefix_ids)} sequences for {len(self.members)} models")
        for number, member in enumerate(self.members):
            member.start(prompt, None if prefix_ids is None else [prefix_ids[number]])

    def next_byte(self) -> Tensor:
        """As `ByteLM.next_byte`."""
        self.parts = torch.stack([member.next_byte() for member in self.members])
        return torch.logsumexp(self.parts + self._logs[:, None], 0)

    def advance(self, byte: int) -> None:
        """As `ByteLM.advance`, for every member."""
        for member in self.members:
            member.advance(byte)

    def log_probs(self, data: bytes | str) -> NDArray[np.float64]:
        """As `ByteLM.log_probs`."""
        self.read = torch.stack([torch.from_numpy(member.log_probs(data)) for member in self.members])
        return np.asarray(torch.logsumexp(self.read + self._logs[:, None], 0))
