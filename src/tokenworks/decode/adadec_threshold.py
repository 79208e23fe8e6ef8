"""The entropy threshold of AdaDec: above it, a model's first choice is more often wrong than it can afford.

    threshold = learn_threshold(load("smollm2-135m"), [(prompt, reference), ...])
    threshold.save("threshold.json")

Every reference is read token by token. At each the model's entropy H is noted, and whether its first choice is the
reference's token. A logistic regression gives P(right | H), and the cut on P that is most often right on held-out
tokens gives back an entropy. It holds for one model, one number format and one kind of text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.measure import auc
from tokenworks.core.models import LoadedModel
from tokenworks.core.session import Engine, Session

Floats = NDArray[np.float64]

SHIPPED = {"smollm2-135m": "adadec-smollm2-135m.json"}
"""Thresholds that come with tokenworks, for Python functions, by the model's name."""

CUTS = np.arange(1, 100) / 100
"""The cuts on P(right | H) that are tried."""


@dataclass(frozen=True)
class EntropyThreshold:
    """Where to pause, and how well that is founded.

    Attributes:
        tau: pause where the entropy is this or more, in nats.
        q: P(right | tau).
        weight, bias: of P(right | H) = sigmoid(weight * H + bias); the weight is negative.
        auc: of -H for being right, over all tokens: 0.5 says nothing, 1 everything.
        accuracy: of the rule on the held-out tokens.
        tokens: of the references.
        right: share of them that were the model's first choice.
        pause_rate: share of them at which it would pause.
        rescuable: of the wrong ones at a pause, the share whose right token was second or third.
        model, dtype: that it was learned for.
        made_by: the call or command that learned it.
    """

    tau: float
    q: float
    weight: float
    bias: float
    auc: float
    accuracy: float
    tokens: int
    right: float
    pause_rate: float
    rescuable: float
    model: str = ""
    dtype: str = ""
    made_by: str = "tokenworks.decode.adadec_threshold.learn_threshold"

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        with atomic_write(Path(path)) as out:
            json.dump(asdict(self), out, indent=1)
            out.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> EntropyThreshold:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a threshold.
        """
        try:
            found = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            math.isfinite(found.tau)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"threshold: {path} is not a saved entropy threshold ({error})") from error
        return found

    def check(self, loaded: LoadedModel) -> EntropyThreshold:
        """Itself, if it was learned for this model and number format.

        Raises:
            InputError: it was not.
        """
        if (self.model, self.dtype) != (loaded.name, _dtype(loaded)):
            raise InputError(
                f"threshold: learned for {self.model} in {self.dtype}, not for {loaded.name} in {_dtype(loaded)}; "
                "learn one for this model: tokenworks train threshold"
            )
        return self


def load_threshold(loaded: LoadedModel, path: str | Path | None = None) -> EntropyThreshold:
    """The threshold for a model: from a file, or the one that comes with tokenworks.

    Raises:
        InputError: there is none for this model, or the file holds none for it.
    """
    if path is None:
        if loaded.name not in SHIPPED:
            raise InputError(
                f"threshold: none comes with tokenworks for {loaded.name}, only for {', '.join(SHIPPED)}. Learn "
                "one from pairs of prompt and reference: tokenworks train threshold"
            )
        path = Path(str(files("tokenworks.decode").joinpath("weights", SHIPPED[loaded.name])))
    return EntropyThreshold.load(path).check(loaded)


def learn_threshold(
    loaded: LoadedModel, pairs: Iterable[tuple[str, str]], seed: int = 42, made_by: str | None = None
) -> EntropyThreshold:
    """Learn where `loaded` should pause, from prompts and what should have followed them.

    Args:
        pairs: (prompt, reference), both as raw text. Not those that you will be judged on. A hundred functions
            (about 5,000 tokens) are enough.
        seed: of the split and of the balancing.
        made_by: a command that repeats this, to be kept with it.

    Raises:
        InputError: no pairs, an empty text, or tokens that a threshold cannot be learned from (see
            `fit_threshold`).
    """
    session, tokenizer = Session(loaded.model), loaded.tokenizer
    entropies: list[float] = []
    ranks: list[int] = []
    for number, (prompt, reference) in enumerate(pairs):
        # Encoded apart, as at decoding time: the model continues the prompt's tokens as they are.
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(reference, add_special_tokens=False)["input_ids"]
        if not before or not after:
            raise InputError(f"pairs: number {number} has an empty prompt or reference; leave it out")
        found = teacher_forced(session, before, after)
        entropies += found[0]
        ranks += found[1]
    found_threshold = fit_threshold(entropies, ranks, seed)
    return replace(
        found_threshold,
        model=loaded.name,
        dtype=_dtype(loaded),
        made_by=made_by or found_threshold.made_by,
    )


def teacher_forced(
    session: Engine, prompt: Sequence[int], reference: Sequence[int]
) -> tuple[list[float], list[int]]:
    """For each token of `reference` the entropy before it, in nats, and its rank (the first choice is 1)."""
    entropies: list[float] = []
    ranks: list[int] = []
    whole, seen = [*prompt, *reference], 0

    def read(ids: Tensor, logits: Tensor) -> None:
        nonlocal seen
        true = torch.tensor(whole[seen + 1 : seen + 1 + len(ids)], device=logits.device)
        skipped = max(0, len(prompt) - 1 - seen)
        seen += len(ids)
        rows = logits[skipped : len(true)].float()
        values = rows.gather(1, true[skipped:, None])
        entropies.extend(entropy(rows).tolist())
        ranks.extend((1 + (rows > values).sum(-1)).tolist())

    session.rollback(0)
    session.prefill(whole, read)
    return entropies, ranks


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits), in nats: float [..., V] to float32 [...]. Tokens at -inf count for nothing."""
    return torch.special.entr(torch.softmax(logits.float(), -1)).sum(-1)


def fit_threshold(entropies: Sequence[float], ranks: Sequence[int], seed: int = 42) -> EntropyThreshold:
    """The threshold from what was seen at each token.

    Four fifths train the regression, thinned so that as many are right as wrong; the last fifth, as it is,
    chooses the cut. Tokens whose entropy is not finite are left out.

    Args:
        entropies: of n tokens, in nats.
        ranks: of the true token, from 1.

    Raises:
        InputError: fewer than 50 tokens; all right or all wrong; or entropy that does not tell one from the other.
    """
    h, rank = np.asarray(entropies, dtype=np.float64), np.asarray(ranks, dtype=np.int64)
    if h.shape != rank.shape or h.ndim != 1:
        raise InputError(f"ranks: {rank.shape} ranks for {h.shape} entropies")
    h, rank = h[np.isfinite(h)], rank[np.isfinite(h)]
    right = rank == 1
    if len(h) < 50:
        raise InputError(f"pairs: {len(h)} tokens are too few to learn from; give at least 50, better 5,000")
    random = np.random.default_rng(seed)
    order = random.permutation(len(h))
    held, train = order[: len(h) // 5], order[len(h) // 5 :]
    sides = [train[right[train]], train[~right[train]]]
    fewer = min(map(len, sides))
    if fewer == 0:
        raise InputError("pairs: the model's first choice is always right or always wrong; nothing to learn from")
    chosen = np.concatenate([random.permutation(side)[:fewer] for side in sides])
    weight, bias = _regress(h[chosen], right[chosen])
    if weight >= 0:
        raise InputError("pairs: the model is no surer where it is right, so its entropy tells nothing here")
    p = _sigmoid(weight * h[held] + bias)
    accuracies = [float(np.mean((p >= cut) == right[held])) for cut in CUTS]
    best = int(np.argmax(accuracies))
    q = float(CUTS[best])
    tau = (math.log(q / (1 - q)) - bias) / weight
    if tau <= 0:
        raise InputError(f"pairs: the best threshold is {tau:.2f} nats, which would pause always; learn on others")
    pausing = h >= tau
    wrong = pausing & ~right
    return EntropyThreshold(
        tau=tau,
        q=q,
        weight=weight,
        bias=bias,
        auc=auc(-h, right),
        accuracy=accuracies[best],
        tokens=len(h),
        right=float(right.mean()),
        pause_rate=float(pausing.mean()),
        rescuable=float((rank[wrong] <= 3).mean()) if wrong.any() else 0.0,
    )


def _regress(h: Floats, right: NDArray[np.bool_]) -> tuple[float, float]:
    """Weight and bias of the logistic regression with a penalty of weight^2 / 2, the usual one."""
    sign = np.where(right, 1.0, -1.0)

    def loss(at: Floats) -> tuple[float, Floats]:
        margin = sign * (at[0] * h + at[1])
        pull = -sign * _sigmoid(-margin)
        value = np.logaddexp(0, -margin).sum() + at[0] ** 2 / 2
        return float(value), np.array([(pull * h).sum() + at[0], pull.sum()])

    found: Any = minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(found.x[0]), float(found.x[1])


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")
