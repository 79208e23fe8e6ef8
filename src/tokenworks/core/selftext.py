"""Text that a model writes itself, with the states it wrote it from: what small helpers of it are distilled on.

A chat model is given only the opening of a user's turn; it invents the request, then answers it, and so on until
the row is full (as in Magpie, arXiv 2406.08464). A model without a chat template continues the openings alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.architectures import cache_argument
from tokenworks.core.files import atomic_write
from tokenworks.core.packing import inference_view
from tokenworks.core.session import SlotCache

ROWS = 48
"""Rows written side by side; more are no faster on a CPU."""

USER_LIMIT = 64
"""A user's turn is cut off after so many tokens."""

TEMPERATURES = (0.0, 0.7, 1.0)
"""Rows take turns between these in the model's answers; requests are always drawn at 1."""

OPENINGS = (
    "Write a short", "Write a Python function", "Write a JavaScript", "Write a SQL query", "Write a poem about",
    "Write an email to", "Write a story", "Explain", "Explain the difference between", "Summarise",
    "Summarize the", "Summarise the following text in two sentences.\n\n", "Rewrite the following",
    "Translate into French:", "Translate into German:", "Translate the following sentence into Spanish:",
    "Solve for x:", "Solve", "A train", "If", "How many", "How do I", "How does", "How much", "What is",
    "What are", "What happens when", "Why", "Why do", "When was", "Who was", "Which", "Where", "Give me",
    "Give three", "List", "I have", "I want to", "I am", "My", "Can you", "Could you", "Please",
    "Fix this code:\n```python\n", "What does this code do?\n```python\n", "Compute", "Find the", "Calculate",
    "Plan", "Describe", "Compare", "Tell me", "Suggest", "The", "In", "Help me",
)  # fmt: skip
"""How a request may begin. A quarter of all requests begin with nothing given."""


@dataclass(frozen=True)
class SelfText:
    """Rows that a model wrote.

    Attributes:
        tokens: int64 [R, T].
        states: float16 [R, T, d]; `lm_head(states[r, t])` are the logits of the token after position t.
        free: bool [R, T], whether the model chose the token at t; the chat template's tokens are given.
    """

    tokens: Tensor
    states: Tensor
    free: Tensor

    def save(self, path: Path) -> None:
        with atomic_write(path, "wb") as out:
            out.write(save({"tokens": self.tokens, "states": self.states, "free": self.free}))

    @classmethod
    def load(cls, path: Path) -> SelfText:
        return cls(**load_file(path))


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int = 384,
    seed: int = 0,
    rows: int = ROWS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> SelfText:
    """Let `model` write `rows` rows of `length` tokens, in one batch; `temperatures` are those of its answers."""
    view, cache = inference_view(model), SlotCache()
    decoder = view.get_decoder()
    generator = torch.Generator().manual_seed(seed)
    writers = [
        _Writer(tokenizer, random.Random(seed * rows + row), temperatures[row % len(temperatures)])
        for row in range(rows)
    ]
    kept, states, free = [], [], []
    tokens = torch.tensor([writer.next(None) for writer in writers])
    for position in range(length):
        kept.append(tokens)
        cache.begin(position, 1)
        state = decoder(
            input_ids=tokens[:, None],
            position_ids=torch.full((rows, 1), position),
            attention_mask=torch.zeros(1, 1, 1, position + 1),
            use_cache=True,
            **{cache_argument(decoder): cache},
        ).last_hidden_state[:, 0]
        states.append(state.half())
        free.append(torch.tensor([writer.free for writer in writers]))
        drawn = _draw(view.get_output_embeddings()(state), writers, generator)
        tokens = torch.tensor([writer.next(token) for writer, token in zip(writers, drawn, strict=True)])
    return SelfText(torch.stack(kept, 1), torch.stack(states, 1), torch.stack(free, 1))


def _draw(logits: Tensor, writers: list[_Writer], generator: torch.Generator) -> list[int]:
    heat = torch.tensor([[writer.temperature] for writer in writers])
    p = torch.softmax(logits / heat.clamp(min=1e-3), dim=-1)
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
    return torch.where(heat[:, 0] == 0, logits.argmax(-1), drawn).tolist()


class _Writer:
    """One row: what is given to the model, and when its own choice counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chance: random.Random, answer_heat: float) -> None:
        self._tokenizer, self._chance, self._answer_heat = tokenizer, chance, answer_heat
        self.free = False
        """Whether the token that `next` returned last was the model's own."""
        self._before, self._between = chat_marks(tokenizer)
        self._given: Iterator[int] = iter(())
        self._asking, self._asked = True, 0
        self._begin()

    @property
    def temperature(self) -> float:
        return 1.0 if self._asking else self._answer_heat

    def next(self, drawn: int | None) -> int:
        """The row's next token: what is given, or else `drawn`."""
        given = next(self._given, None)
        self.free = given is None and drawn is not None
        if given is not None:
            return given
        assert drawn is not None
        if not self._between:
            return drawn
        ends = drawn in (self._between[0], self._tokenizer.eos_token_id)
        self._asked += 1
        if self._asking and (ends or self._asked > USER_LIMIT):
            self._asking, self._given = False, iter(self._between[1:])
            return self._between[0]
        if not self._asking and ends:
            self._begin()
        return drawn

    def _begin(self) -> None:
        opening = "" if self._chance.random() < 0.25 else self._chance.choice(OPENINGS)
        if not self._before and not opening:
            opening = "The"
        self._given = iter([*self._before, *self._tokenizer(opening, add_special_tokens=False)["input_ids"]])
        self._asking, self._asked = bool(self._between), 0


def chat_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the chat template puts before a user's message and between it and the answer; empty without one."""
    if tokenizer.chat_template is None:
        return [], []
    mark = "\x1a"
    message = [{"role": "user", "content": mark}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, between = text.split(mark)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, between)]
    return ids[0], ids[1]
