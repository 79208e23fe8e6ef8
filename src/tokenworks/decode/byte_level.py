"""Byte-level (arXiv 2410.09303): the byte model that a tokenized model is, exactly and without training.

    reader = ByteLM(Session(model), tokenizer)
    reader.log_probs(b"some text")                    # of each byte
    reader.generate("def fibon", max_new_bytes=40)    # the prompt may end inside a token

The probability that a text begins with x is the sum over its *cover*: the token sequences that an encoding can
begin with, that spell x, and whose last token is the one that reaches its end. Continuing enc(x) alone, as is
usual, takes one member for all of them; that is the bias which makes models stumble over prompts that end inside
a token.

The members that share all but their last token are a row here: a sequence `left`, its probability, and the
distribution after it. They differ in the last token, and those that begin with what is left of x are neighbours
in the order of spelling, so a row is summed with two look-ups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine
from tokenworks.core.trace import Trace
from tokenworks.core.tree import ROOT, TokenTree
from tokenworks.decode.encodings import Encodings, Spelling

Floats = NDArray[np.float64]

END = 256
"""The symbol after the 256 bytes: the text ends."""

BLOCK = 48
"""Bytes whose rows are run in one pass when a known text is read."""

TOLERANCE = 1e-2
"""Probability that may go unchecked: the tokens that hold the rest are tried in an encoding one by one. Of what is
not tried some hundredths are not valid, so that a byte's probability is off by some ten-thousandths."""


class ByteModel(Protocol):
    """What reads and writes bytes: `ByteLM`, or a `ByteEnsemble` of several."""

    def start(self, prompt: bytes | str = b"", prefix_ids: Sequence[Sequence[int]] | None = None) -> None: ...

    def next_byte(self) -> Tensor: ...

    def advance(self, byte: int) -> None: ...


@dataclass(frozen=True)
class _Row:
    """The cover members `left` + one token.

    Attributes:
        at: bytes that `left` spells.
        log_p: of `left`.
        sums: float64 [n + 1], cumulated probabilities of the tokens after it, in the order of spelling.
        end: probability that the text ends after it.
    """

    left: tuple[int, ...]
    at: int
    log_p: float
    sums: Floats
    end: float


@dataclass
class ByteGeneration:
    """Bytes that were written.

    Attributes:
        data: the new bytes.
        finish_reason: "stop", "length" or "context".
        log_probs: of each byte under the byte model, untempered, in nats.
        entropies: in bits.
        parts: of an ensemble, each member's log-probability of each byte.
        seconds: wall time.
    """

    data: bytes = b""
    finish_reason: str = "length"
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    def trace(self, names: Sequence[str] = ()) -> Trace:
        """One entry a byte; a character of several bytes stands at its last."""
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
        trace.meta |= {"finish_reason": self.finish_reason, "seconds": self.seconds}
        return trace


class ByteLM:
    """A tokenized model as a model of bytes.

    Args:
        session: the model's.
        tokenizer: its own; byte-level BPE, or SentencePiece BPE with byte fallback.
        stop_ids: tokens that end a text; by default the tokenizer's end of text.
        tolerance: in [0, 1); 0 tries every token, at seconds a byte.

    Attributes:
        passes: forward passes so far.

    Raises:
        InputError: a tokenizer that changes text, or a number out of range.
    """

    def __init__(
        self,
        session: Engine,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int] | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance: {tolerance} is not in [0, 1)")
        self.session, self.tolerance = session, tolerance
        self.encodings = Encodings(tokenizer, session.vocab_size)
        self.spelling = Spelling(self.encodings.vocabulary)
        end = tokenizer.eos_token_id
        self._stops = list(stop_ids) if stop_ids is not None else [] if end is None else [end]
        self._default_prefix = beginning(tokenizer)
        self.passes = 0
        self.data = b""
        """The prompt and what was written since `start`."""
        self._prefix: list[int] = []
        self._rows: list[_Row] = []
        self._known: dict[tuple[int, ...], _Row] = {}
        self._base: tuple[int, ...] = ()

    @torch.inference_mode()
    def start(self, prompt: bytes | str = b"", prefix_ids: Sequence[Sequence[int]] | None = None) -> None:
        """Begin a text.

        Args:
            prompt: the text so far, in UTF-8; it may end inside a token or a character.
            prefix_ids: what stands before the text as token ids, such as a chat template: one sequence (in an
                ensemble one a model). By default what begins a text for this model.

        Raises:
            InputError: bytes that no text in UTF-8 begins with, or no known beginning of a text.
        """
        data = checked_text(prompt)
        prefix = list(prefix_ids[0]) if prefix_ids is not None else self._default_prefix
        if not prefix:
            raise InputError(
                "prefix_ids: this tokenizer has no token that begins a text, and the first token of one cannot be "
                "given a probability without; name the ids that stand before the text"
            )
        self._prefix, self.data, self._known = prefix, data, {}
        # Only tokens that begin near the end can reach beyond it. What all their lefts share is read like any text,
        # and its probability, common to all, left out.
        near = [at for at in range(max(0, len(data) - self.spelling.longest), len(data) + 1) if self._reaches(at)]
        lefts = [left for at in near for left in self.encodings.lefts(data[:at])]
        base = lefts[0]
        for left in lefts:
            base = base[: _common(base, left)]
        self._base = base
        self.session.rollback(0)
        logits = self.session.prefill([*prefix, *base])
        self.passes += 1
        self._keep(base, len(self.encodings.vocabulary.join(base)), 0.0, logits)
        self._run(lefts)
        self._rows = [row for row in self._known.values() if self._weight(row) > 0]
        self._check_rows()

    def _reaches(self, at: int) -> bool:
        """Whether a token that begins at byte `at` can go beyond the text, or none is needed."""
        low, high = self.spelling.beyond(self.data[at:])
        return high > low

    def next_byte(self) -> Tensor:
        """Log-probabilities of the next byte, and of the end at `END`: float64 [257]."""
        total = np.zeros(257)
        highest = max(row.log_p for row in self._rows)
        for row in self._rows:
            weight = math.exp(row.log_p - highest)
            depth = len(self.data) - row.at
            low, high = self.spelling.beyond(self.data[row.at :])
            total[:END] += weight * np.diff(row.sums[self.spelling.split(low, high, depth)])
            if depth == 0:
                total[END] += weight * row.end
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(total / total.sum()))

    @torch.inference_mode()
    def advance(self, byte: int) -> None:
        """Take a byte as written.

        Raises:
            InputError: no encoding goes on with it.
        """
        self._read(bytes([byte]))

    @torch.inference_mode()
    def log_probs(self, data: bytes | str) -> Floats:
        """Of each byte given those before it, going on from the text so far, in nats: float64 [n]."""
        return np.diff(self._read(checked_text(data)))

    def generate(
        self,
        prompt: bytes | str = b"",
        max_new_bytes: int = 128,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prefix_ids: Sequence[Sequence[int]] | None = None,
    ) -> ByteGeneration:
        """Continue a prompt byte by byte; see `write`."""
        self.start(prompt, prefix_ids)
        return write(self, max_new_bytes, sampling, seed)

    def _read(self, data: bytes) -> list[float]:
        """Go on over `data`; log-probabilities of the beginnings before it and after each of its bytes."""
        found = [self._log_cover()]
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            lefts = [self.encodings.lefts(self.data + block[: end + 1]) for end in range(len(block))]
            self._run([left for some in lefts for left in some])
            for byte in block:
                self.data += bytes([byte])
                self._rows += [row for row in self._known.values() if row.at == len(self.data)]
                self._rows = [row for row in self._rows if self._weight(row) > 0]
                self._check_rows()
                found.append(self._log_cover())
            oldest = min(row.at for row in self._rows)
            self._known = {
                left: row for left, row in self._known.items() if row.at >= oldest or left == self._base
            }
        return found

    def _check_rows(self) -> None:
        if not self._rows:
            raise InputError(f"text: the model's tokenizer has no encoding that begins with {self.data[-40:]!r}")

    def _weight(self, row: _Row) -> float:
        """Share of a row's members that begin with the text so far, those that end with it counted as rows."""
        if row.at == len(self.data):
            return 1.0
        low, high = self.spelling.beyond(self.data[row.at :])
        return float(row.sums[high] - row.sums[low])

    def _log_cover(self) -> float:
        """Log-probability of the text so far: the sum over its cover."""
        logs = np.array([row.log_p + math.log(self._weight(row)) for row in self._rows])
        return float(logs.max() + np.log(np.exp(logs - logs.max()).sum()))

    def _run(self, lefts: Sequence[tuple[int, ...]]) -> None:
        """Rows for sequences that have none, and for their beginnings, in one pass over a tree of them."""
        depth = len(self._base)
        new = [left for left in lefts if left not in self._known and left[:depth] == self._base]
        if not new:
            return
        session, offset = self.session, len(self._prefix)
        kept = tuple(session.tokens[offset:])
        common = min(_common(kept, left) for left in new)
        common = min([common, *(len(left) - 1 for left in new)])
        # The row that the first new token is drawn from must be known: go back to where it is.
        while kept[:common] not in self._known:
            common -= 1
        session.rollback(offset + common)
        nodes: dict[tuple[int, ...], int] = {}
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
            if path in self._known or above is None:
                continue
            log_p = above.log_p + self._log_chance(above, path[-1])
            if log_p > -math.inf:
                self._keep(path, len(self.encodings.vocabulary.join(path)), log_p, logits[node])
        longest = max(new, key=len)
        session.commit([nodes[longest[:length]] for length in range(common + 1, len(longest) + 1)])

    def _log_chance(self, row: _Row, token: int) -> float:
        place = self._place[token]
        chance = float(row.sums[place + 1] - row.sums[place])
        return math.log(chance) if chance > 0 else -math.inf

    @property
    def _place(self) -> NDArray[np.int64]:
        """For each id its place in the order of spelling, int64 [V]."""
        if not hasattr(self, "_places"):
            self._places = np.full(len(self.encodings.vocabulary), -1)
            self._places[self.spelling.order] = np.arange(len(self.spelling))
        return self._places

    def _keep(self, left: tuple[int, ...], at: int, log_p: float, logits: Tensor) -> None:
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
        self._known[left] = _Row(left, at, log_p, sums, end / total)

    def _candidates(self, p: Floats) -> NDArray[np.int64]:
        """The likeliest tokens that hold all but `tolerance` of p [n]."""
        if self.tolerance == 0:
            return np.arange(len(p))
        count = 64
        while count < len(p):
            top = np.argpartition(p, -count)[-count:]
            if p.sum() - p[top].sum() <= self.tolerance:
                top = top[np.argsort(-p[top])]
                return top[: 1 + int(np.searchsorted(np.cumsum(p[top]), p.sum() - self.tolerance))]
            count *= 4
        return np.arange(len(p))


class ByteEnsemble:
    """Several byte models as one: the mean of their next-byte distributions, whatever their tokenizers.

    Args:
        members: at least one.
        weights: of the mean, one a member, none negative; equal by default.

    Raises:
        InputError: no members, or weights that do not fit.
    """

    def __init__(self, members: Sequence[ByteLM], weights: Sequence[float] | None = None) -> None:
        if not members:
            raise InputError("members: empty; give at least one byte model")
        chosen = [1.0] * len(members) if weights is None else list(weights)
        if len(chosen) != len(members) or min(chosen) < 0 or sum(chosen) <= 0:
            raise InputError(
                f"weights: {chosen} are not {len(members)} numbers from 0 upwards with a positive sum"
            )
        self.members = list(members)
        self._logs = torch.tensor(chosen, dtype=torch.float64).log() - math.log(sum(chosen))
        self.last_parts: Tensor = torch.empty(0)
        """float64 [members, 257]: what each said of the next byte, when last asked."""

    def start(self, prompt: bytes | str = b"", prefix_ids: Sequence[Sequence[int]] | None = None) -> None:
        """As `ByteLM.start`, with one sequence of prefix ids a member."""
        if prefix_ids is not None and len(prefix_ids) != len(self.members):
            raise InputError(f"prefix_ids: {len(prefix_ids)} sequences for {len(self.members)} models")
        for number, member in enumerate(self.members):
            member.start(prompt, None if prefix_ids is None else [prefix_ids[number]])

    def next_byte(self) -> Tensor:
        """As `ByteLM.next_byte`."""
        self.last_parts = torch.stack([member.next_byte() for member in self.members])
        return torch.logsumexp(self.last_parts + self._logs[:, None], 0)

    def advance(self, byte: int) -> None:
        for member in self.members:
            member.advance(byte)

    def log_probs(self, data: bytes | str) -> Floats:
        """As `ByteLM.log_probs`."""
        parts = torch.stack([torch.from_numpy(member.log_probs(data)) for member in self.members])
        return np.asarray(torch.logsumexp(parts + self._logs[:, None], 0))

    def generate(
        self,
        prompt: bytes | str = b"",
        max_new_bytes: int = 128,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prefix_ids: Sequence[Sequence[int]] | None = None,
    ) -> ByteGeneration:
        """As `ByteLM.generate`."""
        self.start(prompt, prefix_ids)
        return write(self, max_new_bytes, sampling, seed)


def write(
    model: ByteModel, max_new_bytes: int, sampling: Sampling | None = None, seed: int | None = None
) -> ByteGeneration:
    """Write on from where a byte model stands, to the end of the text or `max_new_bytes`.

    Args:
        sampling: of bytes: temperature and cut-offs apply to their distribution, not to that of tokens. By default
            greedy.

    Raises:
        InputError: `max_new_bytes` below 1.
    """
    if max_new_bytes < 1:
        raise InputError(f"max_new_bytes: {max_new_bytes} is not at least 1")
    chosen = sampling or Sampling()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found, begun = ByteGeneration(), time.perf_counter()
    for _ in range(max_new_bytes):
        logs = model.next_byte()
        byte = chosen.draw(logs, generator)
        if byte == END:
            found.finish_reason = "stop"
            break
        p = logs.exp()
        found.entropies.append(float(-(p * logs.clamp(min=-1e4)).sum() / math.log(2)))
        found.log_probs.append(float(logs[byte]))
        if isinstance(model, ByteEnsemble):
            found.parts.append(model.last_parts[:, byte].tolist())
        found.data += bytes([byte])
        model.advance(byte)
    found.seconds = time.perf_counter() - begun
    return found


def infilling_ids(tokenizer: PreTrainedTokenizerBase, after: str, control: tuple[str, str, str]) -> list[int]:
    """What to put before a text that is to be continued until `after` follows: `prefix_ids` for `start`.

    The order is suffix, prefix, middle, so that the text before the gap comes last and may end inside a token.

    Args:
        control: the model's tokens that announce prefix, suffix and middle.

    Raises:
        InputError: the tokenizer does not know these tokens; the model was not trained to fill in.
    """
    known = tokenizer.get_vocab()
    missing = [name for name in control if name not in known]
    if missing:
        raise InputError(f"control: the tokenizer has no {', '.join(missing)}; was the model trained to fill in?")
    before, suffix, middle = (known[name] for name in control)
    return [
        *beginning(tokenizer),
        before,
        suffix,
        *tokenizer(after, add_special_tokens=False)["input_ids"],
        middle,
    ]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand at the beginning of a text: what the tokenizer puts there, else the token that separates
    texts, else the one that begins them; empty if there is none."""
    own = list(tokenizer("")["input_ids"])
    if own:
        return own
    known = tokenizer.get_vocab()
    candidates = [known.get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return [token for token in candidates if token is not None][:1]


def checked_text(text: bytes | str) -> bytes:
    """UTF-8 bytes, which may end inside a character.

    Raises:
        InputError: no text in UTF-8 begins with them.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.end < len(data) or error.reason != "unexpected end of data":
            raise InputError(
                f"prompt: not UTF-8; byte {data[error.start]:#04x} at {error.start} ({error.reason}). Convert the "
                "text to UTF-8 first"
            ) from error
    return data


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
