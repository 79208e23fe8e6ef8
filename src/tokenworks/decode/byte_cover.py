"""The cover of a text that grows byte by byte: which token sequences spell it, and how likely they are.

The members of the cover that share all but their last token are one *row*: what is left of them, its probability,
and the distribution after it. They differ in the last token, and those that begin with the rest of the text are
neighbours in the order of spelling, so a row is summed with two look-ups.

A row costs a forward pass, and is not run before it can hold more than a negligible share of the text's
probability: " Fran" + "c" need not be asked what comes next while all but a thousandth is on " France".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.session import Engine
from tokenworks.core.text import shared_length
from tokenworks.core.tree import ROOT, TokenTree
from tokenworks.decode.byte_writing import END
from tokenworks.decode.encodings import Encodings
from tokenworks.decode.spelling import Spelling, legal_next, unfinished

Floats = NDArray[np.float64]
Left = tuple[int, ...]

BLOCK = 48
"""Bytes that are read together when a known text is read."""

NEGLIGIBLE = 0.1
"""Of the tolerance, the share of a text's probability that may be on rows that are not run."""


@dataclass(frozen=True)
class _Row:
    """The cover members that share all but their last token.

    Attributes:
        at: bytes that what they share spells.
        log_p: of what they share.
        sums: float64 [n + 1], cumulated probabilities of the tokens after it, in the order of spelling.
        end: probability that the text ends after it.
    """

    at: int
    log_p: float
    sums: Floats
    end: float


class Cover:
    """The cover of one text after another.

    Args:
        stops: ids that end a text.
        tolerance: as `ByteLM`.

    Attributes:
        data: the text so far.
        passes: forward passes so far.
    """

    def __init__(self, session: Engine, encodings: Encodings, stops: Sequence[int], tolerance: float) -> None:
        self.session, self.encodings, self.tolerance = session, encodings, tolerance
        self.spelling = Spelling(encodings.vocabulary)
        self.passes = 0
        self.data = b""
        self._stops = list(stops)
        self._prefix: list[int] = []
        self._base: Left = ()
        self._lefts: dict[Left, int] = {}
        """The sequences that a cover member can have before its last token, and the bytes each spells."""
        self._known: dict[Left, _Row] = {}
        """The rows of those that were run."""

    @property
    def room(self) -> int:
        """Tokens that the context still has room for, the longest sequence of the cover taken."""
        longest = max((len(left) for left in self._lefts), default=0)
        return self.session.context_limit - len(self._prefix) - longest

    def start(self, data: bytes, prefix: list[int]) -> None:
        """Begin a text, `prefix` standing before it.

        Raises:
            InputError: it does not fit the context, or the tokenizer cannot spell it.
        """
        # Only tokens that begin near the end can reach beyond it. What all their lefts share is read like any
        # text, and its probability, common to all, left out.
        near = range(max(0, len(data) - self.spelling.longest), len(data) + 1)
        lefts = [left for at in near if self._reaches(data, at) for left in self.encodings.lefts(data[:at])]
        base = lefts[0]
        for left in lefts:
            base = base[: shared_length(base, left)]
        self.check_room(len(prefix) + max(map(len, lefts)), "prompt")
        self.session.rollback(0)
        logits = self.session.prefill([*prefix, *base])
        self.passes += 1
        self.data, self._prefix, self._base, self._lefts, self._known = data, prefix, base, {}, {}
        self._keep(base, len(self.encodings.vocabulary.join(base)), 0.0, logits)
        self._note(lefts)

    def next_byte(self) -> Tensor:
        """Log-probabilities of the next byte, and of the end at `END`: float64 [257]."""
        size = len(self.data)
        self._settle(range(size, size + 1), whole=True)
        total = np.zeros(257)
        rows = [row for left in self._lefts if (row := self._known.get(left)) and self._weight(row, size) > 0]
        highest = max((row.log_p for row in rows), default=0.0)
        for row in rows:
            low, high = self.spelling.beyond(self.data[row.at :])
            places = self.spelling.split(low, high, size - row.at)
            share = math.exp(row.log_p - highest)
            total[:END] += share * np.diff(row.sums[places])
            total[END] += share * row.end * (row.at == size)
        # What is not tried leaks a little to bytes that UTF-8 does not allow.
        total[:END][~legal_next(unfinished(self.data))] = 0.0
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(total / total.sum()))

    def advance(self, byte: int) -> None:
        """Take a byte as written; nothing is run."""
        self._append(bytes([byte]))
        self._forget()

    def read(self, data: bytes) -> list[float]:
        """Go on over `data`: log-probabilities of the text before it and after each of its bytes."""
        size = len(self.data)
        whole = self.encodings.lefts(self.data + data)
        self.check_room(len(self._prefix) + max(map(len, whole), default=0), "data")
        self._settle(range(size, size + 1))
        found = [self._log_cover(size)]
        for first in range(0, len(data), BLOCK):
            block = data[first : first + BLOCK]
            ends = range(len(self.data) + 1, len(self.data) + len(block) + 1)
            self._append(block)
            # What the text itself is made of holds most of the probability, so the rest is judged beside it.
            self._run([left for left, at in self._lefts.items() if at == ends[-1]][:1])
            self._settle(ends)
            found += [self._log_cover(end) for end in ends]
            self._forget()
        return found

    def check_room(self, tokens: int, name: str) -> None:
        """Refuse more tokens than the context holds."""
        if tokens > self.session.context_limit:
            raise InputError(
                f"{name}: {tokens} tokens do not fit the model's context of {self.session.context_limit}; "
                "shorten it"
            )

    def _append(self, data: bytes) -> None:
        for byte in data:
            self.data += bytes([byte])
            self._note(self.encodings.lefts(self.data))

    def _note(self, lefts: Iterable[Left]) -> None:
        """Remember sequences with all their beginnings."""
        pieces = self.encodings.vocabulary.pieces
        start = len(self._base)
        for left in lefts:
            if left in self._lefts or left[:start] != self._base:
                continue
            at = self._known[self._base].at
            for length in range(start, len(left) + 1):
                at += len(pieces[left[length - 1]] or b"") if length > start else 0
                self._lefts.setdefault(left[:length], at)

    def _forget(self) -> None:
        """Drop what no token of can reach the end of the text any more, but for what has yet to be run from."""
        size = len(self.data)
        kept: set[Left] = {self._base}
        for left, at in self._lefts.items():
            if self._reaches(self.data, at) or at == size:
                kept.add(left)
                while left not in self._known:
                    left = left[:-1]
                    kept.add(left)
        self._lefts = {left: at for left, at in self._lefts.items() if left in kept}
        self._known = {left: row for left, row in self._known.items() if left in kept}

    def _reaches(self, data: bytes, at: int) -> bool:
        """Whether a token that begins at byte `at` can go beyond `data`."""
        if len(data) - at >= self.spelling.longest:
            return False
        low, high = self.spelling.beyond(data[at:])
        return high > low

    def _weight(self, row: _Row, end: int) -> float:
        """Share of a row's members that begin with the first `end` bytes; of a row that spells just these, all."""
        if row.at == end:
            return 1.0
        if not 0 < end - row.at < self.spelling.longest:
            return 0.0
        low, high = self.spelling.beyond(self.data[row.at : end])
        return max(0.0, float(row.sums[high] - row.sums[low]))

    def _log_cover(self, end: int) -> float:
        """Log-probability of the first `end` bytes: the sum over their cover."""
        logs = self._shares(end)
        for left, at in self._lefts.items():
            if at == end and left not in self._known and left[:-1] in self._known:
                logs.append(self._bound(left))
        if not logs or max(logs) == -math.inf:
            raise InputError(f"text: the tokenizer has no encoding that begins with {self.data[:end][-40:]!r}")
        return float(np.logaddexp.reduce(logs))

    def _shares(self, end: int) -> list[float]:
        """Log-probabilities that known rows have in the cover of the first `end` bytes."""
        found = []
        for left in self._lefts:
            row = self._known.get(left)
            if row is not None and (weight := self._weight(row, end)) > 0:
                found.append(row.log_p + math.log(weight))
        return found

    def _bound(self, left: Left) -> float:
        """Log-probability of `left` up to the first token after what was run: at least that of all of it."""
        length = len(left)
        while left[: length - 1] not in self._known:
            length -= 1
        above = self._known[left[: length - 1]]
        return above.log_p + self._log_chance(above, left[length - 1])

    def _settle(self, ends: range, whole: bool = False) -> None:
        """Run what may hold more than a negligible share of the probability of one of these beginnings.

        Args:
            whole: also what spells one exactly. Its own probability is known, but not what comes next.
        """
        while wanted := {left: None for end in ends for left in self._wanted(end, whole)}:
            self._run(list(wanted))

    def _wanted(self, end: int, whole: bool) -> list[Left]:
        pending: dict[Left, float] = {}
        for left, at in self._lefts.items():
            # The probability of what spells the beginning exactly is known from the row above it.
            needed = left[:-1] if at == end and not whole else left
            if at > end or needed in self._known or left in self._known:
                continue
            if at == end or self._reaches(self.data[:end], at):
                pending[needed] = self._bound(needed)
        known = self._shares(end)
        limit = NEGLIGIBLE * self.tolerance
        highest = max([*known, *pending.values()], default=-math.inf)
        if highest == -math.inf:
            return []
        total = sum(math.exp(share - highest) for share in known)
        unread, wanted = 0.0, []
        for left, bound in sorted(pending.items(), key=lambda item: item[1]):
            unread += math.exp(bound - highest)
            if unread > limit * total:
                wanted.append(left)
        return wanted

    def _run(self, lefts: Sequence[Left]) -> None:
        """Rows for sequences that have none, and for their beginnings, in one pass over a tree of them."""
        new = [left for left in lefts if left not in self._known]
        if not new:
            return
        session, offset = self.session, len(self._prefix)
        kept = tuple(session.tokens[offset:])
        common = min(min(shared_length(kept, left), self._known_length(left)) for left in new)
        session.rollback(offset + common)
        nodes: dict[Left, int] = {}
        parents: list[int] = []
        for left in new:
            for length in range(common + 1, len(left) + 1):
                path = left[:length]
                if path not in nodes:
                    parents.append(nodes.get(path[:-1], ROOT))
                    nodes[path] = len(nodes)
        logits = session.extend(TokenTree.of([path[-1] for path in nodes], parents))
        self.passes += 1
        for path, node in nodes.items():
            above = self._known.get(path[:-1])
            if path in self._lefts and path not in self._known and above is not None:
                self._keep(path, self._lefts[path], above.log_p + self._log_chance(above, path[-1]), logits[node])
        likeliest = max(new, key=lambda left: self._known[left].log_p)
        session.commit([nodes[likeliest[:length]] for length in range(common + 1, len(likeliest) + 1)])

    def _known_length(self, left: Left) -> int:
        """Tokens of the longest beginning of `left` that was run."""
        length = len(left) - 1
        while left[:length] not in self._known:
            length -= 1
        return length

    def _log_chance(self, row: _Row, token: int) -> float:
        place = self._place[token]
        chance = float(row.sums[place + 1] - row.sums[place])
        return math.log(chance) if chance > 0 else -math.inf

    @cached_property
    def _place(self) -> NDArray[np.int64]:
        """For each id its place in the order of spelling, int64 [V]."""
        places = np.full(len(self.encodings.vocabulary), -1)
        places[self.spelling.order] = np.arange(len(self.spelling))
        return places

    def _keep(self, left: Left, at: int, log_p: float, logits: Tensor) -> None:
        """A row of what may follow `left`; what no encoding goes on with has probability 0, the rest sums to 1."""
        p = torch.softmax(logits.double(), -1).numpy()
        end = float(p[self._stops].sum()) if self._stops else 0.0
        if end and not self.encodings.whole(self.encodings.vocabulary.join(left), left):
            end = 0.0
        own = p[self.spelling.order]
        candidates = self._candidates(own)
        allowed = self.encodings.may_follow(left, self.spelling.order[candidates].tolist())
        own[candidates[~allowed]] = 0.0
        total = own.sum() + end
        sums = np.concatenate([[0.0], np.cumsum(own / total)])
        self._known[left] = _Row(at, log_p, sums, end / total)
        self._lefts.setdefault(left, at)

    def _candidates(self, p: Floats) -> NDArray[np.int64]:
        """The likeliest tokens that hold all but `tolerance` of p [n]."""
        count, whole = 64 if self.tolerance else len(p), p.sum()
        while count < len(p):
            top = np.argpartition(p, -count)[-count:]
            if whole - p[top].sum() <= self.tolerance:
                top = top[np.argsort(-p[top])]
                return top[: 1 + int(np.searchsorted(np.cumsum(p[top]), whole - self.tolerance))]
            count *= 4
        return np.arange(len(p))
