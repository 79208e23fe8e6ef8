"""Who writes the next token? The routers of R2R (arXiv 2505.21600): the learned one, and the plain ones that it is
measured against. All decide by a score and a threshold, and go wherever the learned one goes:

    RoutedDecoder(small, Session(large), EntropyRouter(0.45))
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from tokenworks.core.errors import InputError

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

    @property
    def entropy(self) -> float:
        """Of the small model's distribution at temperature 1, in nats."""
        log_p = torch.log_softmax(self.logits.float(), -1)
        return max(0.0, float(-(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum()))


class Router(Protocol):
    """Says how likely it is that a token of the small model should be the large model's."""

    threshold: float
    """Tokens that score as much or more go to the large model; found for this router on held-out answers."""

    def score(self, step: SmallStep) -> float:
        """In [0, 1] for a learned router; any scale that fits `threshold` for others."""
        ...


class TokenRouter(nn.Module):
    """The learned router: a residual network over state, logits and token.

    State and token embedding are normalised, and of the logits the log-probabilities among the `TOP` taken: the
    authors offer as much as an option (with probabilities), and a few thousand labels need it.

    Args:
        embeddings: float [U, d], the small model's; copied and never trained.
        hidden_size: of the state.
        width, depth: of the network, each at least 1; the paper's are 1024 and 6, for models a hundred times as
            large.
        threshold: see `Router`.
    """

    def __init__(
        self, embeddings: Tensor, hidden_size: int, width: int = 256, depth: int = 2, threshold: float = 0.5
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise InputError(f"width: {width} and depth: {depth} must be at least 1")
        self.threshold, self.width = threshold, width
        self.embeddings: Tensor
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
        felt = layer_norm(hidden, hidden.shape[-1:])
        chosen = layer_norm(self.embeddings[index], self.embeddings.shape[-1:])
        top = self.read_logits(torch.log_softmax(top_logits, -1))
        u = self.enter(torch.cat([felt, chosen, top], -1))
        for block in self.blocks:
            u = u + block(u)
        logits: Tensor = self.leave(u)
        return logits[:, 0]

    @torch.inference_mode()
    def score(self, step: SmallStep) -> float:
        """The probability that the token diverges. The router must be in evaluation mode, as `load_router` leaves
        it: with dropout the same step would score differently each time."""
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
        return step.entropy


class AleatoricRouter:
    """The authors' "log-u" baseline: uncertainty of a Dirichlet whose evidence are the largest logits.

    Args:
        threshold: of the aleatoric uncertainty; the authors' is 2.275.
        k: how many logits, at least 2.
    """

    def __init__(self, threshold: float = 2.275, k: int = 10) -> None:
        if k < 2:
            raise InputError(f"k: {k} is not at least 2; one logit alone is never unsure")
        self.threshold, self.k = threshold, k

    def score(self, step: SmallStep) -> float:
        logits = step.logits.float()
        return self.uncertainty(logits.topk(min(self.k, len(logits))).values)[0]

    @staticmethod
    def uncertainty(evidence: Tensor) -> tuple[float, float]:
        """Aleatoric and epistemic uncertainty of evidence [k], which is taken as positive: with S = sum x_i,
        -sum (x_i / S) (psi(x_i + 1) - psi(S + 1)), and k / (S + k)."""
        x = evidence.clamp(min=1e-6).double()
        total = x.sum()
        aleatoric = -(x / total * (torch.digamma(x + 1) - torch.digamma(total + 1))).sum()
        return float(aleatoric), float(len(x) / (total + len(x)))


class RandomRouter:
    """Each token is the large model's with probability `rate`, whatever it is.

    The draw depends on the seed and the text alone, so that runs repeat, also one after another.

    Raises:
        InputError: a rate outside [0, 1].
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise InputError(f"rate: {rate} is not between 0 and 1")
        self.threshold, self._seed = 1 - rate, seed

    def score(self, step: SmallStep) -> float:
        # In [0, 1): at a rate of 0 the threshold is 1, which is not reached.
        return random.Random(f"{self._seed} {list(step.context)}").random()
