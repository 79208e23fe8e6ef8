"""AWRS: adaptive weighted rejection sampling of a token under a constraint (arXiv 2504.05410).

Given the model's next-token distribution p and a checker c(x) that says whether token x may come next, a sampler
draws a token and a weight w that are *properly weighted* for p c: E[w f(x)] = sum_x p(x) c(x) f(x) for every f,
hence E[w] = Z, the probability that a token of the model is allowed. Masking the vocabulary does this with |V|
checks. Rejection does it with a few, because what the model proposes is mostly allowed.

    draw = two_pass(log_p, constraint.allows, generator)
    draw.token, draw.log_weight, draw.checks

Dropping w leaves locally constrained decoding, whose texts are not the model's own conditioned on the constraint:
it does not notice when it was led into a corner. `decode.smc` uses w to undo that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.sampling import top_ids

Floats = NDArray[np.float64]

Accept = Callable[[int], bool]
"""The checker c: whether a token may come next."""

FIRST_CANDIDATES = 16
"""Greedy choice mostly ends within so many tokens; the whole vocabulary is put in order only otherwise."""

ALL_REJECTED = 1 - 1e-12
"""When the tokens tried hold this much of p, the rest is rounding error. (The authors give up at 1 - 1e-5, which
loses every text that the model finds unlikely at one token.)"""


@dataclass(frozen=True)
class TokenDraw:
    """A token with its weight.

    Attributes:
        token: the id; None if no token was found that is allowed.
        log_weight: log w; -inf without a token.
        checks: how many tokens were checked.
        rejected: the likeliest token that was checked and refused, if any.
    """

    token: int | None
    log_weight: float
    checks: int
    rejected: int | None = None


Sampler = Callable[[Tensor, Accept, torch.Generator | None], TokenDraw]
"""Takes log p [V] (-inf where impossible; need not be normalised), the checker and a generator."""


class _Checked:
    """The checker, asked at most once about each token."""

    def __init__(self, accept: Accept, log_p: Tensor) -> None:
        if not torch.isfinite(log_p.max()):
            raise NumericalError("log_p: no finite entry; the model gives no token a probability")
        self._accept, self._log_p = accept, log_p
        self.known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self.known:
            self.known[token] = self._accept(token)
        return self.known[token]

    def rejected(self, token: int) -> bool:
        return self.known.get(token) is False

    def draw(self, token: int | None, weight: float) -> TokenDraw:
        refused = torch.tensor([t for t, allowed in self.known.items() if not allowed], dtype=torch.long)
        likeliest = int(refused[self._log_p[refused].argmax()]) if len(refused) else None
        alive = token is not None and weight > 0
        return TokenDraw(
            token if alive else None, math.log(weight) if alive else -math.inf, len(self.known), likeliest
        )


def _normalised(log_p: Tensor) -> tuple[Floats, float]:
    """p as float64 [V], and the mass it had before. In numpy, whose single numbers are quick to look up."""
    p = log_p.exp().double().numpy()
    mass = float(p.sum())
    return p / mass, mass


def without_replacement(p: Floats, generator: torch.Generator | None) -> Iterator[int]:
    """Tokens drawn from p [V] one after another, none twice, until none is left that is possible.

    Draws with replacement of which repeats are passed over, which is the same law; the urn is emptied of what was
    drawn whenever that is half of it. Most searches end after a few draws, and sorting Gumbel noise over the whole
    vocabulary, the usual way, would be most of their time.
    """
    drawn: list[int] = []
    left, several = p, 8
    while True:
        edges = left.cumsum()
        total, gone = float(edges[-1]), 0.0
        if total <= 0:
            return
        new = set[int]()
        while gone < total / 2:
            place = torch.rand(several, generator=generator, dtype=torch.float64).numpy() * total
            for token in np.searchsorted(edges, place, side="right").clip(max=len(p) - 1).tolist():
                if token not in new and left[token] > 0:
                    new.add(token)
                    gone += float(left[token])
                    yield token
            several = min(2 * several, 256)
        drawn += new
        left = p.copy()
        left[drawn] = 0.0


def two_pass(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """The paper's estimator: draw without replacement until a token is allowed, then once more for the weight.

    The second pass goes on without the tokens that the first rejected. With R the mass that the first pass
    rejected and n the tokens that both rejected, w = (1 - R) / (n + 1).
    """
    checked = _Checked(accept, log_p)
    p, mass = _normalised(log_p)
    token, first_rejected, rejected = None, 0.0, 0
    for second in (False, True):
        for candidate in without_replacement(p, generator):
            if checked.rejected(candidate):
                continue  # it left the urn in the first pass
            if checked(candidate):
                token = candidate if token is None else token
                break
            rejected += 1
            if not second:
                first_rejected += float(p[candidate])
        if token is None:
            break
    return checked.draw(token, mass * max(0.0, 1 - first_rejected) / (rejected + 1))


def recursive(
    log_p: Tensor, accept: Accept, generator: torch.Generator | None = None, max_rejects: float = math.inf
) -> TokenDraw:
    """The estimator of the authors' library: Z = q + (1 - q) Z' at every draw, q the probability of the draw.

    One order of the tokens; after the first that is allowed, one more check decides whether the tail counts.

    Args:
        max_rejects: give up (w = 0) after so many refusals, at least 2. Still unbiased.
    """
    _at_least_two(max_rejects, "max_rejects")
    checked = _Checked(accept, log_p)
    p, mass = _normalised(log_p)
    multiplier, rejected_mass, rejects = 1.0, 0.0, 0
    order = without_replacement(p, generator)
    candidate = next(order, None)
    while candidate is not None:
        following = next(order, None)
        q = min(1.0, float(p[candidate]) / (1 - rejected_mass)) if following is not None else 1.0
        if checked(candidate):
            certain = following is None or rejects == max_rejects - 1 or checked(following)
            return checked.draw(candidate, mass * multiplier * (1.0 if certain else q))
        rejects += 1
        if rejects >= max_rejects or rejected_mass + float(p[candidate]) >= ALL_REJECTED:
            break
        multiplier *= 1 - q
        rejected_mass += float(p[candidate])
        candidate = following
    return checked.draw(None, 0.0)


def geometric(
    log_p: Tensor,
    accept: Accept,
    generator: torch.Generator | None = None,
    max_accepts: int = 2,
    max_rejects: float = math.inf,
) -> TokenDraw:
    """Rejection with replacement, acted out without: tokens known to be refused are drawn only in the mind.

    How often they would have been drawn again follows a geometric law. With a acceptances among n draws, the
    unbiased estimate of Z is (a - 1) / (n - 1).

    Args:
        max_accepts: acceptances to wait for, at least 2; more of them lower the variance of w.
        max_rejects: give up waiting after so many refusals, at least 2. Still unbiased.
    """
    _at_least_two(max_accepts, "max_accepts")
    _at_least_two(max_rejects, "max_rejects")
    checked = _Checked(accept, log_p)
    p, mass = _normalised(log_p)
    token, accepts, rejects, rejected_mass = None, 0, 0.0, 0.0
    while accepts < max_accepts and rejects < max_rejects:
        found = False
        for candidate in without_replacement(p, generator):
            if checked.rejected(candidate):
                continue
            if rejected_mass > 0:
                rejects += _phantoms(1 - rejected_mass, generator)
            if rejects >= max_rejects:
                break
            if checked(candidate):
                token = candidate if token is None else token
                accepts, found = accepts + 1, True
                break
            rejects += 1
            rejected_mass += float(p[candidate])
            if rejected_mass >= ALL_REJECTED or rejects >= max_rejects:
                break
        if not found:
            break
    if token is None:
        return checked.draw(None, 0.0)
    rejects = min(rejects, max_rejects)
    return checked.draw(token, mass * min(max_accepts - 1, accepts) / (accepts + rejects - 1))


def _phantoms(chance: float, generator: torch.Generator | None) -> float:
    """How many draws fail before one succeeds with probability `chance`."""
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    return math.floor(math.log1p(-uniform) / math.log1p(-chance)) if chance < 1 else 0


def awrs(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """`geometric` where one token holds most of p, else `recursive`: the authors' choice."""
    highest = float((log_p.max() - torch.logsumexp(log_p, 0)).exp())
    chosen = geometric if highest >= 2 / 3 else recursive
    return chosen(log_p, accept, generator)


def rejection(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """Plain rejection, the baseline: draw with replacement until two tokens are allowed; w = 1 / (n - 1).

    It needs 2 / Z draws on average, and looks for ever if nothing is allowed: it gives up at a million.
    """
    p, mass = _normalised(log_p)
    found: list[int] = []
    checks, refused = 0, None
    while len(found) < 2:
        for token in torch.multinomial(torch.from_numpy(p), 64, replacement=True, generator=generator).tolist():
            checks += 1
            if accept(token):
                found.append(token)
                if len(found) == 2:
                    return TokenDraw(found[0], math.log(mass / (checks - 1)), checks, refused)
            else:
                refused = token
        if checks >= 1_000_000:
            break
    return TokenDraw(None, -math.inf, checks, refused)


def masked(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """Masking, the baseline: check every token. w = Z, without any chance in it."""
    possible = (log_p > -torch.inf).nonzero()[:, 0].tolist()
    allowed = torch.zeros(len(log_p), dtype=torch.bool)
    allowed[[token for token in possible if accept(token)]] = True
    return draw_masked(log_p, allowed, generator, len(possible))


def draw_masked(
    log_p: Tensor, allowed: Tensor, generator: torch.Generator | None = None, checks: int = 0
) -> TokenDraw:
    """From a mask, bool [V], that an engine made at once."""
    p = log_p.double().exp()
    inside = torch.where(allowed, p, 0.0)
    wanted = int(p.argmax())
    rejected = None if allowed[wanted] else wanted
    total = float(inside.sum())
    if total <= 0:
        return TokenDraw(None, -math.inf, checks, rejected)
    return TokenDraw(int(torch.multinomial(inside, 1, generator=generator)), math.log(total), checks, rejected)


def proposal(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """The model's own next token; w = 1 or 0. Particles with it are sample-and-rerank, or twisted SMC."""
    p, mass = _normalised(log_p)
    token = int(torch.multinomial(torch.from_numpy(p), 1, generator=generator))
    allowed = accept(token)
    return TokenDraw(token if allowed else None, math.log(mass) if allowed else -math.inf, 1,
                     None if allowed else token)  # fmt: skip


def local(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """Locally constrained decoding without a mask: one pass of rejection without replacement, w = 1."""
    checked = _Checked(accept, log_p)
    p, _ = _normalised(log_p)
    token = next((t for t in without_replacement(p, generator) if checked(t)), None)
    return checked.draw(token, 1.0)


def greedy(log_p: Tensor, accept: Accept, generator: torch.Generator | None = None) -> TokenDraw:
    """The likeliest token that is allowed, w = 1: what locally constrained decoding is at temperature 0."""
    checked = _Checked(accept, log_p)
    for token in top_ids(log_p[None], min(FIRST_CANDIDATES, len(log_p)))[0].tolist():
        if checked(token):
            return checked.draw(token, 1.0)
    rest = (t for t in log_p.argsort(descending=True).tolist() if log_p[t] > -torch.inf)
    return checked.draw(next((t for t in rest if checked(t)), None), 1.0)


SAMPLERS: dict[str, Sampler] = {
    "awrs": awrs,
    "two-pass": two_pass,
    "recursive": recursive,
    "geometric": geometric,
    "rejection": rejection,
    "masked": masked,
    "proposal": proposal,
    "local": local,
    "greedy": greedy,
}
"""By name. The last two are not properly weighted: their texts follow the local distribution."""


def sampler(name: str) -> Sampler:
    """One of `SAMPLERS`.

    Raises:
        InputError: no such sampler.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler: no {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _at_least_two(value: float, name: str) -> None:
    if value < 2:
        raise InputError(f"{name}: {value} is not at least 2; with fewer the weight would not be unbiased")
