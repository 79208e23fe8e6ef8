"""Sequential Monte Carlo: texts of a model conditioned on a constraint, from weighted particles in one Session.

    posterior = SMC(session, particles=5).generate(prompt_ids, regex(r"...", tokenizer), stop_ids=stops)
    posterior.best, posterior.log_evidence

The target is p(text) restricted to allowed texts that end within `max_new_tokens`, p with the given sampling
settings. Every particle is a path of one token tree that hangs under the prompt: one pass runs them all, particles
that agree share their nodes, and resampling copies nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine
from tokenworks.core.trace import Trace
from tokenworks.core.tree import ROOT, TokenTree, TreeShape
from tokenworks.decode.awrs import Sampler, TokenDraw, awrs, draw_masked, greedy, masked
from tokenworks.decode.constraint import Constraint, Maskable

Critic = Callable[[tuple[int, ...]], float]
"""A log potential of the tokens so far; the last one multiplies a text's probability, those before steer."""


@dataclass(frozen=True)
class ConstrainedStep:
    """How one token came about.

    Attributes:
        probability: of the token, under the model.
        log_weight: log of the estimate of Z, the probability that a token of the model is allowed here.
        checks: tokens that the constraint was asked about.
        rejected: the likeliest token that was refused.
        ess: effective sample size after the step, in particles.
    """

    probability: float
    log_weight: float
    checks: int
    rejected: int | None
    ess: float = math.nan


@dataclass(frozen=True)
class Particle:
    """One text and its weight."""

    constraint: Constraint
    tokens: tuple[int, ...] = ()
    steps: tuple[ConstrainedStep, ...] = ()
    log_weight: float = 0.0
    finished: bool = False
    slot: int = ROOT
    """Node of the tree that the particle ends at."""

    @property
    def text(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.finished and self.log_weight > -math.inf else self.tokens


@dataclass
class Posterior:
    """Weighted texts.

    Attributes:
        particles: each a text up to and including its stop token (none if the limit ended it). Weights of dead
            ones are -inf.
        ess: effective sample size after each step, before resampling.
        resampled: the steps after which particles were drawn anew.
        checks: tokens that the constraint was asked about, over all particles.
        passes: forward passes of the model.
        nodes: tokens that those passes ran, the prompt's left out.
        seconds: wall time; `constraint_seconds` of it in the samplers, which includes the checks.
    """

    particles: list[Particle] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    resampled: list[int] = field(default_factory=list)
    checks: int = 0
    passes: int = 0
    nodes: int = 0
    seconds: float = 0.0
    constraint_seconds: float = 0.0

    @property
    def log_evidence(self) -> float:
        """Log of the mean weight: an unbiased estimate of the probability that the model's text is allowed."""
        return _log_mean([particle.log_weight for particle in self.particles])

    @property
    def probabilities(self) -> dict[tuple[int, ...], float]:
        """Of each different text, without its stop token, the likeliest first; empty if every particle died."""
        if self.log_evidence == -math.inf:
            return {}
        total = self.log_evidence + math.log(len(self.particles))
        found: dict[tuple[int, ...], float] = {}
        for particle in self.particles:
            if particle.log_weight > -math.inf:
                found[particle.text] = found.get(particle.text, 0.0) + math.exp(particle.log_weight - total)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def best(self) -> Particle:
        """A particle with the likeliest text.

        Raises:
            InputError: every particle died.
        """
        probabilities = self.probabilities
        if not probabilities:
            length = max((len(particle.tokens) for particle in self.particles), default=0)
            raise InputError(
                f"constraint: no text that satisfies it was found; all {len(self.particles)} particles died "
                f"within {length + 1} tokens. Allow more tokens, use more particles, or ask for it in the prompt"
            )
        text = next(iter(probabilities))
        return next(p for p in self.particles if p.text == text and p.log_weight > -math.inf)

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """The best text: what each token cost, and what the model would rather have written."""
        best = self.best
        trace, steps = Trace.from_ids(best.tokens, tokenizer), best.steps
        wanted = [None if s.rejected is None else repr(tokenizer.decode([s.rejected])) for s in steps]
        bits = [max(0.0, -s.log_weight / math.log(2)) for s in steps]
        if any(bits):  # samplers that drop the weight have no estimate
            trace.add("forced", bits, "bits by which the constraint pulled: -log2 of the mass the model gave to "
                      "what is allowed (an estimate)", 0)  # fmt: skip
        trace.add("probability", [s.probability for s in steps], "of the token under the model", 0, 1)
        trace.add("checks", [float(s.checks) for s in steps], "tokens that the constraint was asked about", 0)
        trace.add("wanted", wanted, "the likeliest token that was refused here")
        trace.add("particles", [s.ess for s in steps], "effective sample size", 0, len(self.particles))
        trace.meta |= {
            "log_evidence": self.log_evidence,
            "probability_of_text": self.probabilities[best.text],
            "checks": self.checks,
            "seconds": self.seconds,
        }
        return trace


class SMC:
    """Particles that a constraint guides.

    Args:
        session: the model's; a generation starts it anew.
        sampler: one of `decode.awrs.SAMPLERS`, or your own. By default AWRS, or `greedy` when `sampling` is.
        particles: N, at least 1.
        ess_threshold: in [0, 1]; particles are drawn anew when the effective sample size falls below this share
            of N. 0 never does: the particles are then independent, as in sample-and-rerank.
        sampling: temperature and cut-offs of the model's distribution, which is what is conditioned. By default
            temperature 1. Top-k and top-p change the target.
        critic: see `Critic`.

    Raises:
        InputError: a number out of range, or a greedy `sampling` with several particles.
    """

    def __init__(
        self,
        session: Engine,
        sampler: Sampler | None = None,
        particles: int = 5,
        ess_threshold: float = 0.5,
        sampling: Sampling | None = None,
        critic: Critic | None = None,
    ) -> None:
        if particles < 1:
            raise InputError(f"particles: {particles} is not at least 1")
        if not 0 <= ess_threshold <= 1:
            raise InputError(f"ess_threshold: {ess_threshold} is not between 0 and 1")
        self.sampling = sampling if sampling is not None else Sampling(1.0)
        if self.sampling.greedy and particles > 1:
            raise InputError(f"particles: {particles} greedy ones would all be the same; use 1, or a temperature")
        self.session, self.particles, self.ess_threshold = session, particles, ess_threshold
        self.sampler: Sampler = sampler or (greedy if self.sampling.greedy else awrs)
        self.critic: Critic = critic or (lambda tokens: 0.0)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        constraint: Constraint,
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        seed: int | None = None,
    ) -> Posterior:
        """Continue `prompt` by texts that `constraint` allows; it judges the new tokens only.

        Args:
            prompt: at least one token id.
            stop_ids: at least one; a text ends with one of these, where the constraint is complete.
            seed: of the draws; None takes PyTorch's own state.

        Raises:
            InputError: an empty prompt, no stop ids, no room, or what the constraint raises.
            NumericalError: the model returned NaN.
        """
        stops = frozenset(stop_ids)
        if not stops:
            raise InputError(
                "stop_ids: empty; a text under a constraint must be able to end. Give the id that does"
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        begun, found, session = time.perf_counter(), Posterior(), self.session
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        session.rollback(0)
        rows = {ROOT: self._log_p(session.prefill(prompt))}
        found.passes, nodes = 1, 0
        limit = min(max_new_tokens, session.context_limit - session.length)
        found.particles = [Particle(constraint, log_weight=self.critic(()))] * self.particles
        for length in range(limit + 1):
            started = time.perf_counter()
            last = length == limit
            moved = [p if p.finished else self._step(p, rows[p.slot], stops, last, generator)
                     for p in found.particles]  # fmt: skip
            found.constraint_seconds += time.perf_counter() - started
            found.checks += sum(p.steps[-1].checks for p in moved if len(p.steps) > length)
            found.particles, ess = moved, _ess([p.log_weight for p in moved])
            found.ess.append(ess)
            if 0 < ess < self.ess_threshold * self.particles:
                found.particles = self._resampled(moved, generator)
                found.resampled.append(length)
            found.particles = [_noting(p, length, ess) for p in found.particles]
            if all(p.finished for p in found.particles):
                break
            nodes += self._run(found.particles, rows, nodes)
            found.passes += 1
        session.rollback()
        found.nodes, found.seconds = nodes, time.perf_counter() - begun
        return found

    def _log_p(self, logits: Tensor) -> Tensor:
        if self.sampling.greedy:
            return torch.log_softmax(logits.float(), -1)
        return self.sampling.distribution(logits).log()

    def _step(
        self,
        particle: Particle,
        log_p: Tensor,
        stops: frozenset[int],
        last: bool,
        generator: torch.Generator | None,
    ) -> Particle:
        """The particle with one more token; at the limit it can only end."""
        constraint = particle.constraint
        if last:
            ends = torch.full_like(log_p, -torch.inf)
            ends[list(stops)] = log_p[list(stops)]
            log_p = ends
            if not (constraint.complete and log_p.max() > -torch.inf):
                return replace(particle, log_weight=-math.inf, finished=True)
        draw = self._draw(log_p, constraint, stops, generator)
        step = ConstrainedStep(0.0, draw.log_weight, draw.checks, draw.rejected)
        if draw.token is None:
            return replace(particle, steps=(*particle.steps, step), log_weight=-math.inf, finished=True)
        tokens, ended = (*particle.tokens, draw.token), draw.token in stops
        gain = draw.log_weight + self.critic(tokens) - self.critic(particle.tokens)
        return replace(
            particle,
            constraint=constraint if ended else constraint.after(draw.token),
            tokens=tokens,
            steps=(*particle.steps, replace(step, probability=float(log_p[draw.token].exp()))),
            log_weight=particle.log_weight + gain,
            finished=ended,
        )

    def _draw(
        self, log_p: Tensor, constraint: Constraint, stops: frozenset[int], generator: torch.Generator | None
    ) -> TokenDraw:
        if self.sampler is masked and isinstance(constraint, Maskable):
            allowed = torch.zeros(len(log_p), dtype=torch.bool)
            engine = constraint.mask()
            allowed[: len(engine)] = engine[: len(allowed)]
            allowed[list(stops)] = constraint.complete
            return draw_masked(log_p, allowed, generator, len(log_p))
        return self.sampler(
            log_p, lambda token: constraint.complete if token in stops else constraint.allows(token), generator
        )

    def _resampled(self, particles: list[Particle], generator: torch.Generator | None) -> list[Particle]:
        """N drawn from the weighted particles (systematic resampling), all with the mean weight."""
        logs = torch.tensor([p.log_weight for p in particles], dtype=torch.float64)
        edges = torch.softmax(logs, 0).cumsum(0)
        start = torch.rand((), generator=generator, dtype=torch.float64)
        places = (torch.arange(len(particles)) + start) / len(particles)
        chosen = torch.searchsorted(edges, places).clamp(max=len(particles) - 1).tolist()
        mean = _log_mean(logs.tolist())
        return [replace(particles[index], log_weight=mean) for index in chosen]

    def _run(self, particles: list[Particle], rows: dict[int, Tensor], first: int) -> int:
        """One pass over the last tokens; particles learn their new slots. Returns how many nodes it had."""
        alive = [(index, (p.slot, p.tokens[-1])) for index, p in enumerate(particles) if not p.finished]
        wanted = dict.fromkeys(place for _, place in alive)
        shape = TreeShape(tuple(parent for parent, _ in wanted), first)
        logits = self.session.extend(TokenTree(torch.tensor([token for _, token in wanted]), shape))
        slots = {place: first + number for number, place in enumerate(wanted)}
        rows.clear()
        rows.update({first + number: self._log_p(row) for number, row in enumerate(logits)})
        for index, place in alive:
            particles[index] = replace(particles[index], slot=slots[place])
        return len(wanted)


def _noting(particle: Particle, step: int, ess: float) -> Particle:
    """The particle with the effective sample size written to its newest step."""
    if len(particle.steps) != step + 1:
        return particle
    return replace(particle, steps=(*particle.steps[:-1], replace(particle.steps[-1], ess=ess)))


def _ess(log_weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2; 0 if every weight is 0."""
    logs = torch.tensor(log_weights, dtype=torch.float64)
    if logs.max() == -torch.inf:
        return 0.0
    w = (logs - logs.max()).exp()
    return float(w.sum() ** 2 / (w**2).sum())


def _log_mean(log_weights: Sequence[float]) -> float:
    logs = torch.tensor(log_weights, dtype=torch.float64)
    return float(torch.logsumexp(logs, 0)) - math.log(len(logs))
