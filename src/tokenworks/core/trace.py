"""Trace: tokens with named per-token channels, the record of what a method decided at each token and why.

    trace = Trace.from_ids(token_ids, tokenizer)
    trace.add("entropy", bits, "of the next-token distribution, in bits")
    print(trace.to_terminal("entropy"))

A channel has one value a token: numbers (entropy, reward, bits) or categories (who wrote it); None is "no value".
Traces render in a terminal, a notebook and as a self-contained HTML page, and round-trip through JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write

Values = Sequence[float | None] | Sequence[str | None]

# Okabe and Ito's colours, which colour-blind readers can tell apart; with black or white text, whichever reads.
CATEGORY_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#999999")
# Five stops of cividis, dark blue to yellow.
NUMBER_COLOURS = ("#00224e", "#434e6c", "#7d7c78", "#bcae6c", "#fee838")


@dataclass(frozen=True)
class Channel:
    """One value a token.

    Args:
        values: numbers, or strings, or None where there is no value. NaN and infinities become None.
        description: one sentence, with the unit.
        low, high: ends of the colour scale for numbers; by default the smallest and the largest value.
    """

    values: list[Any]
    description: str = ""
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        values = [None if isinstance(v, float) and not math.isfinite(v) else v for v in self.values]
        kinds = {str if isinstance(v, str) else float for v in values if v is not None}
        if len(kinds) > 1:
            raise InputError("values: numbers and strings are mixed; a channel holds one or the other")
        object.__setattr__(self, "values", values)
        numbers = [v for v in values if v is not None] if kinds == {float} else []
        if numbers:
            object.__setattr__(self, "low", min(numbers) if self.low is None else self.low)
            object.__setattr__(self, "high", max(numbers) if self.high is None else self.high)

    @cached_property
    def kind(self) -> Literal["number", "category"]:
        return "category" if any(isinstance(v, str) for v in self.values) else "number"

    @cached_property
    def categories(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(v for v in self.values if isinstance(v, str)))

    def summary(self) -> str:
        """Mean and range of numbers, or how often each category occurs."""
        present = [v for v in self.values if v is not None]
        if not present:
            return "no values"
        if self.kind == "category":
            return ", ".join(f"{name} {count}" for name, count in Counter(present).most_common())
        mean = sum(present) / len(present)
        return f"mean {mean:.3g}, from {min(present):.3g} to {max(present):.3g}"


@dataclass
class Trace:
    """Tokens and their channels.

    Args:
        tokens: text of each token; joined they are the text.
        token_ids: of each token, if known.
        channels: by name; each as long as `tokens`.
        meta: JSON data about the whole ("title", "method", ...).

    Raises:
        InputError: lengths differ.
    """

    tokens: list[str]
    token_ids: list[int] | None = None
    channels: dict[str, Channel] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.token_ids is not None and len(self.token_ids) != len(self.tokens):
            raise InputError(f"token_ids: {len(self.token_ids)} ids for {len(self.tokens)} tokens")
        for name, channel in self.channels.items():
            self._check_length(name, channel.values)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Trace:
        """A stretch of the tokens with its values; colour scales stay those of the whole."""
        channels = {
            name: Channel(c.values[part], c.description, c.low, c.high) for name, c in self.channels.items()
        }
        ids = None if self.token_ids is None else self.token_ids[part]
        return Trace(self.tokens[part], ids, channels, dict(self.meta))

    @classmethod
    def from_ids(cls, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Trace:
        """Each token's text, such that the pieces join to the decoded whole.

        A character spread over several tokens goes to the token that completes it; the earlier ones show "".
        """
        ids = [int(token) for token in token_ids]
        pieces: list[str] = []

        def decode(start: int, end: int) -> str:
            return str(tokenizer.decode(ids[start:end], skip_special_tokens=False))

        start, shown = 0, 0  # the text from token `start` on, of which `shown` characters are given out
        for end in range(1, len(ids) + 1):
            text = decode(start, end)
            whole = end == len(ids) or not text.endswith("\ufffd")
            pieces.append(text[shown:] if whole else "")
            if whole:
                # Decode on from this token, not from the first, or a long text would take quadratic time.
                start = end - 1
                shown = len(decode(start, end))
                if "\ufffd" in decode(start, end):  # the token alone is no whole character
                    start, shown = end, 0
        return cls(pieces, ids)

    def add(
        self, name: str, values: Values, description: str = "", low: float | None = None, high: float | None = None
    ) -> Trace:
        """Add or replace a channel; returns the Trace itself.

        Raises:
            InputError: not one value a token, or numbers mixed with strings.
        """
        self._check_length(name, values)
        self.channels[name] = Channel(list(values), description, low, high)
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON data: no NaN, no infinities."""
        channels = {
            name: {"values": c.values, "description": c.description, "low": c.low, "high": c.high}
            for name, c in self.channels.items()
        }
        return {"tokens": self.tokens, "token_ids": self.token_ids, "channels": channels, "meta": self.meta}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trace:
        """What `to_dict` gave.

        Raises:
            InputError: it is not the data of a Trace.
        """
        try:
            channels = {name: Channel(**fields) for name, fields in data["channels"].items()}
            return cls(data["tokens"], data.get("token_ids"), channels, data.get("meta", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"data: not a Trace ({error!r})") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        with atomic_write(Path(path)) as out:
            json.dump(self.to_dict(), out, allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a Trace.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"path: {path} is not a saved Trace ({error})") from error

    def to_html(self, title: str | None = None) -> str:
        """A self-contained page: all channels, a legend, and every value of a token on hover or focus."""
        from tokenworks.core.trace_html import trace_page

        return trace_page(self, title or str(self.meta.get("title", "Trace")))

    def _repr_html_(self) -> str:
        from tokenworks.core.trace_html import trace_fragment

        return trace_fragment(self)

    def to_terminal(self, channel: str | None = None, colour: bool | None = None) -> str:
        """The text with one channel shown, and a legend.

        Args:
            channel: by default the first.
            colour: background colours; by default if standard output is a terminal and NO_COLOR is not set.
                Without colour, runs of tokens with one category stand in brackets, and numbers follow their token.

        Raises:
            InputError: no such channel.
        """
        if not self.channels:
            return "".join(self.tokens)
        name = next(iter(self.channels)) if channel is None else channel
        if name not in self.channels:
            raise InputError(f"channel: no {name!r}; there are {', '.join(self.channels)}")
        if colour is None:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        found = self.channels[name]
        tokens = [_printable(token) for token in self.tokens]
        body = _coloured(tokens, found) if colour else _plain(tokens, found)
        return f"{body}\n\n{name}: {found.description or found.kind} ({found.summary()})"

    def _check_length(self, name: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.tokens):
            raise InputError(f"channel {name!r}: {len(values)} values for {len(self.tokens)} tokens")


def _printable(token: str) -> str:
    """Control characters would move the cursor or change colours; newlines and tabs may stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in token)


def _plain(tokens: list[str], channel: Channel) -> str:
    """Category runs as [name|text], the commonest and the missing left bare; numbers as text{value}."""
    if channel.kind == "number":
        return "".join(t if v is None else f"{t}{{{v:.3g}}}" for t, v in zip(tokens, channel.values, strict=True))
    common = Counter(v for v in channel.values if v is not None).most_common(1)[0][0]
    bare = {common, None}
    parts: list[str] = []
    previous = common
    for token, value in [*zip(tokens, channel.values, strict=True), ("", common)]:
        if value != previous and not {value, previous} <= bare:
            parts += ["]"] * (previous not in bare) + [f"[{value}|"] * (value not in bare)
        previous = value
        parts.append(token)
    return "".join(parts)


def _coloured(tokens: list[str], channel: Channel) -> str:
    """The tokens on coloured grounds, and below them what the colours mean, as ANSI text."""
    text = Text()
    for token, value in zip(tokens, channel.values, strict=True):
        text.append(token, _style(channel, value))
    text.append("\n")
    if channel.kind == "category":
        for name in channel.categories:
            text.append(f"\n {name} ", _style(channel, name))
    elif channel.low is not None and channel.high is not None:
        text.append(f"\n{channel.low:.3g} ")
        for step in range(11):
            text.append(" ", _style(channel, channel.low + (channel.high - channel.low) * step / 10))
        text.append(f" {channel.high:.3g}")
    console = Console(force_terminal=True, color_system="truecolor", width=10_000, highlight=False)
    with console.capture() as captured:
        console.print(text, end="", soft_wrap=True)
    return captured.get()


def _style(channel: Channel, value: Any) -> str:
    if value is None:
        return ""
    if channel.kind == "category":
        ground = CATEGORY_COLOURS[channel.categories.index(value) % len(CATEGORY_COLOURS)]
    else:
        span = (channel.high or 0) - (channel.low or 0)
        place = min(1.0, max(0.0, (value - (channel.low or 0)) / span)) if span else 0.0
        ground = _between(place)
    red, green, blue = (int(ground[i : i + 2], 16) for i in (1, 3, 5))
    readable = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#ffffff"
    return f"{readable} on {ground}"


def _between(place: float) -> str:
    """The colour at `place` in [0, 1] along NUMBER_COLOURS."""
    scaled = place * (len(NUMBER_COLOURS) - 1)
    lower = min(int(scaled), len(NUMBER_COLOURS) - 2)
    share = scaled - lower
    ends = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in NUMBER_COLOURS[lower : lower + 2]]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))
