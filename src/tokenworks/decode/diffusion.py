"""Decoding with a masked-diffusion model, the plain way: in each step the surest proposals are kept.

These are the samplers that LLaDA and Dream come with, and the record of what they wrote. What stands between them
and the model may cut corners (`Proposer`), and does in FreeCache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.trace import Trace
from tokenworks.decode.masked_diffusion import MaskedDiffusionLM

Confidence = Literal["probability", "margin", "entropy", "random"]

OnTokens = Callable[[list[tuple[int, int]]], None]


class Proposer(Protocol):
    """What a sampler asks for predictions.

    Attributes:
        model: the diffusion model.
        tokens_fed: positions run since `start`.
    """

    model: MaskedDiffusionLM
    tokens_fed: int

    def start(self, prompt_length: int) -> None:
        """A new text, whose first tokens are the prompt."""

    def logits(self, tokens: Tensor) -> tuple[int, Tensor]:
        """The first slot of `tokens` [L] that has a prediction, and those of it and all later slots [n, V]."""


@dataclass(frozen=True)
class Unmasked:
    """How one slot was filled.

    Attributes:
        step: from 1.
        confidence: the model's probability of the token.
        guide: the guide's probability of it; None without a guide.
        source: "schedule", "guided" (accepted) or "free" (written although the guide accepted nothing).
    """

    step: int
    confidence: float
    guide: float | None
    source: str


@dataclass
class Diffusion:
    """What a sampler wrote.

    Attributes:
        token_ids: the new tokens [G].
        unmasked: for each of them how it was filled.
        unmasked_per_step: how many in each step.
        tokens_fed: positions that the diffusion model ran.
        guide_calls: forward passes of the guide.
        seconds: wall time.
    """

    token_ids: list[int] = field(default_factory=list)
    unmasked: list[Unmasked | None] = field(default_factory=list)
    unmasked_per_step: list[int] = field(default_factory=list)
    tokens_fed: int = 0
    guide_calls: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Forward passes of the diffusion model."""
        return len(self.unmasked_per_step)

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """The new tokens with the step in which each was written, and how sure both models were."""
        trace, found = Trace.from_ids(self.token_ids, tokenizer), self.unmasked
        trace.add("source", [u.source if u else "end" for u in found], "what let the token be written")
        trace.add("step", [u.step if u else None for u in found], "pass of the diffusion model that wrote it")
        trace.add("confidence", [u.confidence if u else None for u in found], "the model's probability", 0, 1)
        trace.add("guide", [u.guide if u else None for u in found], "the guide's probability", 0, 1)
        trace.meta |= {
            "steps": self.steps,
            "tokens_fed": self.tokens_fed,
            "guide_calls": self.guide_calls,
            "unmasked_per_step": self.unmasked_per_step,
            "seconds": self.seconds,
        }
        return trace


def transfer_counts(masked: int, steps: int, schedule: Literal["even", "linear"] = "even") -> list[int]:
    """How many slots to unmask in each step: int [steps], summing to `masked`.

    "even" is LLaDA's, the remainder first; "linear" is Dream's, a share 1 - s/t of what is masked for times t from
    1 down to 0.001, and the rest at the end.
    """
    if schedule == "even":
        return [masked // steps + (step < masked % steps) for step in range(steps)]
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
    counts: list[int] = []
    for t, s in itertools.pairwise(times[:-1]):
        counts.append(int((masked - sum(counts)) * (1 - s / t)))
    return [*counts, masked - sum(counts)]


def confidence(logits: Tensor, kind: Confidence, chance: torch.Generator | None = None) -> Tensor:
    """How sure the model is of its first choice in each row: float [n], larger is surer."""
    if kind == "random":
        return torch.rand(len(logits), generator=chance)
    p = torch.softmax(logits.float(), -1)
    if kind == "entropy":
        return (p * p.clamp(min=1e-30).log()).sum(-1)
    best = p.topk(2, dim=-1).values
    return best[:, 0] if kind == "probability" else best[:, 0] - best[:, 1]


def generate_diffusion(
    proposer: Proposer,
    prompt: Sequence[int] | Tensor,
    length: int,
    steps: int | None = None,
    block: int | None = None,
    kind: Confidence = "probability",
    schedule: Literal["even", "linear"] = "even",
    seed: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Diffusion:
    """The plain sampler: in each step the surest of the proposals are kept, the model's first choice each.

    Args:
        proposer: the model, such as `FreeCache(model, "none")`, which approximates nothing.
        prompt: [P] token ids.
        length: G >= 1 slots to fill.
        steps: in all; by default G, one slot a step.
        block: fill blocks of this length one after another (semi-autoregressive); by default all of G at once.
        kind: what "surest" means.
        schedule: see `transfer_counts`.
        seed: of "random"; None takes PyTorch's own state.
        on_tokens: called with the newly written (position, token) after each step, positions from the first slot.

    Raises:
        InputError: a batch, an empty prompt, an id that does not fit, a length or number of steps that does not
            divide into blocks.
    """
    state = Writing(proposer, prompt, length, on_tokens)
    block = length if block is None else block
    if block < 1 or length % block:
        raise InputError(f"block: {block} does not divide the length of {length}")
    blocks = length // block
    each = (length if steps is None else steps) // blocks
    if each < 1 or each > block or (steps is not None and steps % blocks):
        raise InputError(f"steps: {steps} must be {blocks} to {length}, and a multiple of {blocks}")
    if kind not in get_args(Confidence):
        raise InputError(f"kind: there is no {kind!r}; choose {', '.join(get_args(Confidence))}")
    chance = None if seed is None else torch.Generator().manual_seed(seed)
    for number in range(blocks):
        first, end = state.first + number * block, state.first + (number + 1) * block
        for count in transfer_counts(block, each, schedule):
            begin, logits = state.propose()
            slots = torch.arange(first, end)[state.ids[first:end] == proposer.model.mask_token_id]
            sure = confidence(logits[slots - begin], kind, chance)
            chosen = slots[sure.argsort(descending=True, stable=True)[:count]].sort().values
            state.write(chosen.tolist(), logits[chosen - begin], "schedule")
    return state.finish()


class Writing:
    """A text under way."""

    def __init__(
        self, proposer: Proposer, prompt: Sequence[int] | Tensor, length: int, on_tokens: OnTokens | None
    ) -> None:
        ids, mask = torch.as_tensor(prompt), proposer.model.mask_token_id
        if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
            raise InputError(
                f"prompt: expected one sequence of token ids, got {list(ids.shape)}; give one prompt at a time"
            )
        if ids.min() < 0 or ids.max() >= proposer.model.vocab_size or (ids == mask).any():
            raise InputError(
                f"prompt: an id is not in the model's vocabulary of {proposer.model.vocab_size}, or a mask"
            )
        if length < 1:
            raise InputError(f"length: {length} is not at least 1")
        self.first = len(ids)
        self.ids = torch.cat([ids.long(), torch.full((length,), mask)])
        self.found = Diffusion(unmasked=[None] * length)
        self._proposer, self._on_tokens, self._begun = proposer, on_tokens, time.perf_counter()
        proposer.start(self.first)

    @property
    def masked(self) -> bool:
        return bool((self.ids == self._proposer.model.mask_token_id).any())

    @property
    def next_slot(self) -> int:
        """The first masked one."""
        return int((self.ids == self._proposer.model.mask_token_id).nonzero()[0])

    def propose(self) -> tuple[int, Tensor]:
        """As `Proposer.logits`, without the mask, which no slot may be filled with."""
        begin, logits = self._proposer.logits(self.ids)
        self.found.unmasked_per_step.append(0)
        allowed = logits.clone()
        allowed[:, self._proposer.model.mask_token_id] = -torch.inf
        return begin, allowed

    def write(self, slots: list[int], logits: Tensor, source: str, chances: Sequence[float] | None = None) -> None:
        """Fill slots with the model's first choice."""
        best = torch.softmax(logits.float(), -1).max(-1)
        new = []
        for place, slot in enumerate(slots):
            token, sure = int(best.indices[place]), float(best.values[place])
            guide = None if chances is None else chances[place]
            self.ids[slot] = token
            self.found.unmasked[slot - self.first] = Unmasked(self.found.steps, sure, guide, source)
            new.append((slot - self.first, token))
        self.found.unmasked_per_step[-1] += len(new)
        if self._on_tokens is not None:
            self._on_tokens(new)

    def end(self, token: int) -> None:
        """Fill all slots that are left with the token that ends a text."""
        self.ids[self.ids == self._proposer.model.mask_token_id] = token

    def finish(self) -> Diffusion:
        self.found.token_ids = self.ids[self.first :].tolist()
        self.found.tokens_fed = self._proposer.tokens_fed
        self.found.seconds = time.perf_counter() - self._begun
        return self.found
