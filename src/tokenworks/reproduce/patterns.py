"""Constraints to measure with: patterns and their questions, few-text constraints, and their exact posteriors."""

from __future__ import annotations

import math

import regex as re
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.session import Session
from tokenworks.decode.constraint import EngineConstraint

PATTERNS = {
    "date": (r"[0-9]{4}-(0[1-9]|1[0-2])-([0-2][0-9]|3[01])", "Give me a date in the form YYYY-MM-DD."),
    "time": (r"([01][0-9]|2[0-3]):[0-5][0-9]", "What time is it? Answer in the form HH:MM."),
    "e-mail": (r"[a-z][a-z0-9.]{2,15}@[a-z]{3,12}\.(com|org|net)", "Write an e-mail address."),
    "colour": (r"#[0-9a-f]{6}", "Write a colour as a hexadecimal code."),
    "version": (r"v?[0-9]+\.[0-9]+\.[0-9]+", "What is the latest version number of Python?"),
    "phone": (r"\+[0-9]{1,2} [0-9]{3} [0-9]{3} [0-9]{4}", "Write an American phone number, beginning with +1."),
    "address": (r"([0-9]{1,3}\.){3}[0-9]{1,3}", "Write an IPv4 address."),
    "price": (r"\$[0-9]{1,4}\.[0-9]{2}", "How much is a pair of shoes?"),
    "name": (r"[A-Z][a-z]+ [A-Z][a-z]+", "Name a famous scientist."),
    "list": (r"([a-z]+, ){2,4}[a-z]+", "List some fruits, separated by commas."),
    "verdict": (r"(Yes|No), because [a-z ,']+\.", "Is the sea salty? Explain in one sentence."),
    "sum": (r"[0-9]+ \+ [0-9]+ = [0-9]+", "Write an addition, such as 1 + 2 = 3."),
}
FEW = {
    "Do fish fly? Answer yes or no.": ("No", "Yes", "No.", "Yes.", "yes", "No, they swim", "The sea is blue"),
    "Is 7 a prime number? Answer yes or no.": ("Yes.", "No.", "Yes", "No", "yes", "Although 7 is even"),
    "What is the capital of France? Answer with one word.": (
        "The capital of France is Paris.", "The capital of England is London.", "Paris", "Lyon", "What is what",
    ),
    "What is 2+3? Answer with a number.": ("2 + 3 = 5", "2 + 3 = 6", "The number is 5", "5", "To my mind, 4"),
}  # fmt: skip
"""Questions, and all the answers that are allowed: some begin likely and end unlikely."""


def one_of(texts: tuple[str, ...]) -> str:
    """The regular expression of a few texts."""
    return "|".join(re.escape(text, special_only=True) for text in texts)


class Pattern:
    """A regular expression as a checker of bytes: of beginnings, and of whole texts."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def prefix(self, text: bytes) -> bool:
        read = _readable(text)
        return read is not None and self._pattern.fullmatch(read, partial=True) is not None

    def complete(self, text: bytes) -> bool:
        read = _readable(text)
        return read is not None and self._pattern.fullmatch(read) is not None


def _readable(text: bytes) -> str | None:
    """The patterns are ASCII: whatever is not is no beginning of them."""
    return text.decode() if text.isascii() else None


def enumerate_texts(
    session: Session, ids: list[int], here: EngineConstraint, stops: list[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """The model's probability of every allowed text, over all its tokenizations."""
    found: dict[str, float] = {}
    session.rollback(0)

    def follow(constraint: EngineConstraint, logits: Tensor, written: list[int], log_p: float) -> None:
        row = torch.log_softmax(logits.double(), -1)
        if constraint.complete:
            text = str(tokenizer.decode(written))
            found[text] = found.get(text, 0.0) + math.exp(log_p + float(torch.logsumexp(row[stops], 0)))
        for token in constraint.mask().nonzero()[:, 0].tolist():
            length = session.length
            if token < len(row) and token not in stops and log_p + float(row[token]) > -30:
                follow(
                    constraint.after(token), session.prefill([token]), [*written, token], log_p + float(row[token])
                )
                session.rollback(length)

    with torch.inference_mode():
        follow(here, session.prefill(ids), [], 0.0)
    return found


def by_text(shares: dict[tuple[int, ...], float], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    found: dict[str, float] = {}
    for tokens, share in shares.items():
        text = str(tokenizer.decode(list(tokens)))
        found[text] = found.get(text, 0.0) + share
    return found
