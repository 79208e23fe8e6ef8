"""R2R (arXiv 2505.21600): a small model writes, and a router hands single tokens over to the large one.

    decoder = RoutedDecoder(small, Session(large), load_router(small))
    result = decoder.generate(prompt_ids, 64, stop_ids)
    result.trace(tokenizer)                     # who wrote each token

After each small step the router looks at what the small model felt (its last hidden state, its hundred largest
logits, the token it chose) and estimates the probability that this token would lead the text elsewhere. At or
above the threshold the large model, whose cache is brought up to date in one pass, writes the token instead. What
the small model had proposed enters neither cache. No text is taken back: this is not lossless, and no draft.

One sequence at a time, as a Session holds one; a batch is refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine, Session
from tokenworks.core.text import one_prompt
from tokenworks.core.trace import Trace
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.r2r_routers import Router, SmallStep


class Weights(NamedTuple):
    """Parameters that a pass of each of the three multiplies with; NaN of an engine that does not say."""

    small: float
    large: float
    router: float


@dataclass
class RoutedGeneration:
    """What was written, and by whom.

    Attributes:
        weights: of the two models and the router.
        token_ids: the new tokens, up to and including the first stop token.
        finish_reason: "stop", "length" or "context".
        routed: for each token whether the large model wrote it.
        scores: of the router.
        proposals: what the small model had chosen.
        entropies: of the small model, in bits.
        large_tokens_read: tokens that the large model ran, the prompt included: real work that
            `activated_parameters` leaves out.
        seconds: wall time, the prompt's passes included.
    """

    weights: Weights
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    routed: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    proposals: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    large_tokens_read: int = 0
    seconds: float = 0.0

    @property
    def large_passes(self) -> int:
        """Forward passes of the large model: one for each token it wrote."""
        return sum(self.routed)

    @property
    def large_share(self) -> float:
        """Share of the tokens that the large model wrote; NaN without tokens."""
        return self.large_passes / len(self.routed) if self.routed else math.nan

    @property
    def activated_parameters(self) -> float:
        """Parameters that ran for a token, on average (the paper's cost): small + router + share x large."""
        return self.weights.small + self.weights.router + self.large_share * self.weights.large

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else math.nan

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """Each token with its writer, the router's score, and what the small model would have written."""
        trace = Trace.from_ids(self.token_ids, tokenizer)
        wanted = [
            repr(tokenizer.decode([p])) if p != t else None
            for p, t in zip(self.proposals, self.token_ids, strict=True)
        ]
        trace.add(
            "writer", ["large" if routed else "small" for routed in self.routed], "which model wrote the token"
        )
        trace.add("score", self.scores, "of the router; at or above its threshold the large model writes")
        trace.add("small wanted", wanted, "what the small model had chosen, where the large one chose otherwise")
        trace.add("entropy", self.entropies, "of the small model at this token, in bits", 0)
        trace.meta |= {
            "finish_reason": self.finish_reason,
            "large_share": self.large_share,
            "large_tokens_read": self.large_tokens_read,
            "activated_parameters": self.activated_parameters,
            "seconds": self.seconds,
        }
        return trace


class RoutedDecoder:
    """Small and large model side by side, each with its own cache.

    Args:
        small: the small model behind a `Session`; its tokens are those of the large one.
        large: an engine of the large model; a generation starts it anew.
        router: decides token by token.
        threshold: instead of the router's own. Above every score the small model writes alone, at or below every
            score the large one.
        sampling: of both; by default greedy.

    Raises:
        InputError: the models' vocabularies do not fit together, a threshold that is no number, or a small model
            whose engine does not show its state.
    """

    def __init__(
        self,
        small: DraftModel,
        large: Engine,
        router: Router,
        threshold: float | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        if small.vocab_size != large.vocab_size or small.session.input_size < large.vocab_size:
            raise InputError(
                f"small: it writes ids below {small.vocab_size} and reads ids below {small.session.input_size}, "
                f"but the large model has {large.vocab_size}. They must share a tokenizer: distil a small model "
                "with `tokenworks train draft`"
            )
        self.small, self.large, self.router = small, large, router
        self.threshold = router.threshold if threshold is None else threshold
        if math.isnan(self.threshold):
            raise InputError("threshold: NaN; give a number, or leave it out for the router's own")
        self.sampling = sampling if sampling is not None else Sampling()
        self._session = watched(small)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        seed: int | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> RoutedGeneration:
        """Continue `prompt`.

        Args:
            prompt: at least one token id; a batch is refused.
            max_new_tokens: at least 1.
            stop_ids: generation ends with the first of these, whoever writes it; it is kept.
            seed: of the draws when sampling; None takes PyTorch's own state.
            on_tokens: called with each new id, in a list.

        Raises:
            InputError: an empty prompt, a batch, a prompt longer than a model's context, `max_new_tokens` below 1.
            NumericalError: a model returned NaN.
        """
        limit = min(self._session.context_limit, self.large.context_limit)
        context = one_prompt(prompt, limit)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        stops, begun = frozenset(stop_ids), time.perf_counter()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        run = Weights(weights(self._session), weights(self.large), weights(self.router))
        found = RoutedGeneration(run)
        self._session.rollback(0)
        self.large.rollback(0)
        while len(found.token_ids) < max_new_tokens:
            if len(context) > limit:
                found.finish_reason = "context"
                break
            step = self._small_step(context, generator)
            score = self.router.score(step)
            routed, token = score >= self.threshold, step.token
            if routed:
                new = context[self.large.length :]
                found.large_tokens_read += len(new)
                token = self.sampling.draw(self.large.prefill(new), generator)
            context.append(token)
            found.token_ids.append(token)
            found.routed.append(routed)
            found.scores.append(score)
            found.proposals.append(step.token)
            found.entropies.append(step.entropy / math.log(2))
            found.seconds = time.perf_counter() - begun
            if on_tokens is not None:
                on_tokens([token])
            if token in stops:
                found.finish_reason = "stop"
                break
        return found

    def _small_step(self, context: Sequence[int], generator: torch.Generator | None) -> SmallStep:
        session, vocabulary = self._session, self.small.vocabulary
        logits = session.prefill(context[session.length :])[: len(vocabulary)]
        assert session.hidden is not None
        index = self.sampling.draw(logits, generator)
        return SmallStep(session.hidden[-1], logits, index, int(vocabulary[index]), context)


def watched(small: DraftModel) -> Session:
    """The small model's Session, told to keep the states that routers look at.

    Raises:
        InputError: its engine is another one, which does not show them.
    """
    if not isinstance(small.session, Session):
        raise InputError("small: its engine does not show its last state; put the small model behind a Session")
    small.session.keep_hidden = True
    return small.session


def weights(of: Engine | Router) -> float:
    """Parameters that a pass multiplies with: all but embeddings that are only looked up. None of a router that
    was not learned; NaN of an engine that does not show its model."""
    if isinstance(of, Session):
        looked_up = {id(p) for p in of.model.get_input_embeddings().parameters()}
        head = {id(p) for p in of.model.get_output_embeddings().parameters()}
        return sum(p.numel() for p in of.model.parameters() if id(p) not in looked_up or id(p) in head)
    if isinstance(of, nn.Module):
        return sum(p.numel() for p in of.parameters())
    return math.nan if hasattr(of, "prefill") else 0
