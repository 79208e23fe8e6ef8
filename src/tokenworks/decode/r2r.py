"""R2R (arXiv 2505.21600): a small model writes, and a router hands single tokens over to the large one.

    decoder = RoutedDecoder(small, Session(large), load_router(small))
    result = decoder.generate(prompt_ids, 64, stop_ids)
    result.trace(tokenizer)                     # who wrote each token

After each small step the router looks at what the small model felt (its last hidden state, its hundred largest
logits, the token it chose) and estimates the probability that this token would lead the text elsewhere. At or
above the threshold the large model, whose cache is brought up to date in one pass, writes the token instead. What
the small model had proposed enters neither cache. No text is taken back: this is not lossless, and no draft.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine
from tokenworks.core.trace import Trace
from tokenworks.decode.draft_model import DraftModel

TOP = 100
"""Logits that the router sees, the largest first (the authors' number)."""


@dataclass(frozen=True)
class SmallStep:
    """What a router may look at.

    Attributes:
        hidden: float [d], the small model's last state, from which it made its logits.
        logits: float [U].
        index: of the token it chose, in its own vocabulary of U tokens.
        token: the same, as an id of the large model.
        context: all ids before it.
    """

    hidden: Tensor
    logits: Tensor
    index: int
    token: int
    context: Sequence[int]


class Router(Protocol):
    """Says how likely it is that a token of the small model should be the large model's."""

    threshold: float
    """Tokens that score as much or more go to the large model; found for this router on held-out answers."""

    def score(self, step: SmallStep) -> float:
        """In [0, 1] for a learned router; any scale that fits `threshold` for others."""
        ...


class TokenRouter(nn.Module):
    """The learned router: a residual network over state, logits and token.

    Args:
        embeddings: float [U, d], the small model's; copied and never trained.
        hidden_size: d of the state.
        width, depth: of the network; the paper's are 1024 and 6, for models a hundred times as large.
        threshold: see `Router`.
    """

    def __init__(
        self, embeddings: Tensor, hidden_size: int, width: int = 256, depth: int = 2, threshold: float = 0.5
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("embeddings", embeddings.detach().clone().float(), persistent=False)
        self.top = min(TOP, len(embeddings))
        d = embeddings.shape[1]
        self.read_logits = nn.Linear(self.top, d)
        self.enter = nn.Sequential(nn.Linear(hidden_size + 2 * d, width), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(4 * width, width),
                nn.Dropout(0.1),
            )
            for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, top_logits: Tensor, index: Tensor) -> Tensor:
        """Logits [B] of the probability to diverge, from [B, d], [B, top] in falling order and int64 [B]."""
        assert isinstance(self.embeddings, Tensor)
        u = self.enter(torch.cat([hidden, self.embeddings[index], self.read_logits(top_logits)], -1))
        for block in self.blocks:
            u = u + block(u)
        logits: Tensor = self.leave(u)
        return logits[:, 0]

    @torch.inference_mode()
    def score(self, step: SmallStep) -> float:
        top = step.logits.topk(self.top).values
        logit = self(step.hidden[None].float(), top[None].float(), torch.tensor([step.index]))
        return float(torch.sigmoid(logit))


@dataclass
class EntropyRouter:
    """The paper's plain baseline: the large model where the small one is unsure.

    Args:
        threshold: in nats; the authors' is 0.45.
    """

    threshold: float = 0.45

    def score(self, step: SmallStep) -> float:
        log_p = torch.log_softmax(step.logits.float(), -1)
        return float(-(log_p.exp() * log_p).sum())


class AleatoricRouter:
    """The authors' "log-u" baseline: uncertainty of a Dirichlet whose evidence are the largest logits.

    Args:
        threshold: of the aleatoric uncertainty; the authors' is 2.275.
        k: how many logits.
    """

    def __init__(self, threshold: float = 2.275, k: int = 10) -> None:
        self.threshold, self.k = threshold, k

    def score(self, step: SmallStep) -> float:
        return self.uncertainty(step.logits.float().topk(self.k).values)[0]

    @staticmethod
    def uncertainty(evidence: Tensor) -> tuple[float, float]:
        """Aleatoric and epistemic uncertainty of positive evidence [k]."""
        x = evidence.clamp(min=1e-6).double()
        total = x.sum()
        aleatoric = -(x / total * (torch.digamma(x + 1) - torch.digamma(total + 1))).sum()
        return float(aleatoric), float(len(x) / (total + len(x)))


class RandomRouter:
    """A baseline: each token is the large model's with probability `rate`, whatever it is."""

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.threshold = 1 - rate
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, step: SmallStep) -> float:
        # In (0, 1]: at a rate of 0 the threshold is 1, which must not be reached.
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


class OracleRouter:
    """Asks the large model itself at every token: 1 where the two, greedily, choose differently. What a router
    aims at, and no saving.

    Args:
        large: an engine of the large model, other than the decoder's.
    """

    threshold = 0.5

    def __init__(self, large: Engine) -> None:
        self._large = large

    def score(self, step: SmallStep) -> float:
        context = list(step.context)
        if self._large.tokens != context[: self._large.length] or self._large.length >= len(context):
            self._large.rollback(0)
        logits = self._large.prefill(context[self._large.length :])
        return float(int(logits.argmax()) != step.token)


@dataclass
class RoutedGeneration:
    """What was written, and by whom.

    Attributes:
        token_ids: the new tokens.
        finish_reason: "stop", "length" or "context".
        routed: for each token whether the large model wrote it.
        scores: of the router.
        proposals: what the small model had chosen.
        entropies: of the small model, in bits.
        large_tokens_read: tokens that the large model ran, the prompt included.
        parameters: of the small and the large model.
        seconds: wall time.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    routed: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    proposals: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    large_tokens_read: int = 0
    parameters: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @property
    def large_share(self) -> float:
        """Share of the tokens that the large model wrote; it is also its passes a token."""
        return sum(self.routed) / len(self.routed) if self.routed else 0.0

    @property
    def activated_parameters(self) -> float:
        """Parameters that ran for a token, on average (the paper's cost): small + share x large."""
        return self.parameters[0] + self.large_share * self.parameters[1]

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
            "activated_parameters": self.activated_parameters,
            "seconds": self.seconds,
        }
        return trace


class RoutedDecoder:
    """Small and large model side by side, each with its own cache.

    Args:
        small: the small model; its tokens are those of the large one.
        large: an engine of the large model; a generation starts it anew.
        router: decides token by token.
        threshold: instead of the router's own. Above every score the small model writes alone, at or below every
            score the large one.
        sampling: of both; by default greedy.

    Raises:
        InputError: the models' vocabularies do not fit together.
    """

    def __init__(
        self,
        small: DraftModel,
        large: Engine,
        router: Router,
        threshold: float | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        if small.vocab_size != large.vocab_size:
            raise InputError(
                f"small: it writes {small.vocab_size} different tokens and the large one {large.vocab_size}; they "
                "must have the same tokenizer. Distil one with `tokenworks train draft`"
            )
        self.small, self.large, self.router = small, large, router
        self.threshold = router.threshold if threshold is None else threshold
        if math.isnan(self.threshold):
            raise InputError("threshold: NaN; give a number")
        self.sampling = sampling if sampling is not None else Sampling()
        small.session.keep_hidden = True  # type: ignore[attr-defined]

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        seed: int | None = None,
    ) -> RoutedGeneration:
        """Continue `prompt`.

        Raises:
            InputError: an empty prompt, or `max_new_tokens` below 1.
            NumericalError: a model returned NaN.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        context = [int(token) for token in torch.as_tensor(prompt).flatten()]
        if not context:
            raise InputError("prompt: empty; give at least one token")
        stops, begun = frozenset(stop_ids), time.perf_counter()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found = RoutedGeneration(parameters=(parameters(self.small.session), parameters(self.large)))
        self.small.session.rollback(0)
        self.large.rollback(0)
        limit = min(self.small.session.context_limit, self.large.context_limit)
        while len(found.token_ids) < max_new_tokens:
            if len(context) >= limit:
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
            log_p = torch.log_softmax(step.logits.float(), -1)
            found.entropies.append(float(-(log_p.exp() * log_p).sum()) / math.log(2))
            if token in stops:
                found.finish_reason = "stop"
                break
        found.seconds = time.perf_counter() - begun
        return found

    def _small_step(self, context: Sequence[int], generator: torch.Generator | None) -> SmallStep:
        session = self.small.session
        logits = session.prefill(context[session.length :])[: len(self.small.vocabulary)]
        index = self.sampling.draw(logits, generator)
        hidden: Tensor = session.hidden[-1]  # type: ignore[attr-defined]
        return SmallStep(hidden, logits, index, int(self.small.vocabulary[index]), context)


def parameters(engine: Engine) -> int:
    """Weights that a pass of a model multiplies with: all but the embeddings that are only looked up."""
    model: nn.Module | None = getattr(engine, "model", None)
    if model is None:
        return 0
    looked_up = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    head = {id(p) for p in model.get_output_embeddings().parameters()}  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters() if id(p) not in looked_up or id(p) in head)
