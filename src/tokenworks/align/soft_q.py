"""Exact maximum-entropy control over a small tree of texts: what DPO is claimed to find (arXiv 2404.12358).

A state s is the text so far, an action a the next token, the next state both together; with a reward r(s, a) at
every token and a reference, the policy that maximises E[sum r] - beta KL(policy || reference) over whole texts is

    V(s)   = beta log sum_a exp(Q(s, a) / beta)                 V = 0 where a text has ended
    Q(s,a) = r(s, a) + beta log ref(a | s) + V(s a)             (the Bellman identity)
    log pi(a | s) = (Q(s, a) - V(s)) / beta

so that beta log(pi / ref) = r(s, a) + V(s a) - V(s): the implicit reward of a token is its reward and a difference
of potentials, and over a whole text the potentials leave only -V(empty text), the same for all texts of a prompt.
All this is exact here, in float64, and the oracle that the tests and the reproduction hold DPO against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tokenworks.align.contract import check_positive
from tokenworks.core.errors import InputError

Text = tuple[int, ...]

Reward = Callable[[Text, int], float]
"""r(s, a): of a token behind a text."""

Reference = Callable[[Text], Tensor]
"""Log-probabilities [V] (or logits) of the token after a text."""

LARGEST = 100_000
"""States of a tree that is still solved."""


class SoftQSolver:
    """The optimum by backward recursion.

    Args:
        reward_fn, ref_fn: see `Reward` and `Reference`.
        vocab: V, at least 2.
        horizon: tokens of a text, at least 1.
        beta: above 0.
        end: a token that ends a text before the horizon, if there is one.

    Attributes:
        values: V(s) of every state, 0 where the text has ended.
        rewards, log_ref, q, log_policy: of every state that goes on, float64 [V].

    Raises:
        InputError: a number out of range, a tree that is too large, a reward or reference that is not finite.
    """

    def __init__(
        self, reward_fn: Reward, ref_fn: Reference, vocab: int, horizon: int, beta: float, end: int | None = None
    ) -> None:
        check_positive(beta=beta)
        if vocab < 2 or horizon < 1:
            raise InputError(f"vocab, horizon: {vocab} and {horizon}; at least 2 tokens and 1 step are needed")
        if vocab**horizon > LARGEST:
            raise InputError(f"horizon: {vocab}^{horizon} texts are too many to enumerate; at most {LARGEST}")
        self.vocab, self.horizon, self.beta, self.end = vocab, horizon, beta, end
        self.values: dict[Text, float] = {}
        self.rewards: dict[Text, Tensor] = {}
        self.log_ref: dict[Text, Tensor] = {}
        self.q: dict[Text, Tensor] = {}
        self.log_policy: dict[Text, Tensor] = {}
        self._reward_fn, self._ref_fn = reward_fn, ref_fn
        self._solve(())

    def _solve(self, text: Text) -> float:
        if self.ended(text):
            self.values[text] = 0.0
            return 0.0
        below = torch.tensor([self._solve((*text, token)) for token in range(self.vocab)], dtype=torch.float64)
        rewards = torch.tensor([self._reward_fn(text, token) for token in range(self.vocab)], dtype=torch.float64)
        log_ref = torch.log_softmax(self._ref_fn(text).double(), -1)
        if log_ref.shape != (self.vocab,):
            raise InputError(f"ref_fn: gave {list(log_ref.shape)} numbers after {text}, not [{self.vocab}]")
        q = rewards + self.beta * log_ref + below
        value = self.beta * torch.logsumexp(q / self.beta, 0)
        if not torch.isfinite(value) or not torch.isfinite(rewards).all():
            raise InputError(f"reward_fn, ref_fn: not finite after {text}")
        self.rewards[text], self.log_ref[text], self.q[text] = rewards, log_ref, q
        self.log_policy[text] = (q - value) / self.beta
        self.values[text] = float(value)
        return float(value)

    def ended(self, text: Text) -> bool:
        """Whether nothing follows a text."""
        return len(text) == self.horizon or (self.end is not None and text[-1:] == (self.end,))

    def texts(self) -> list[Text]:
        """All whole texts."""
        return [text for text in self.values if self.ended(text)]

    def steps(self, text: Text) -> list[tuple[Text, int]]:
        """The states and actions that a text goes through."""
        return [(text[:place], token) for place, token in enumerate(text)]

    def total(self, table: dict[Text, Tensor], text: Text) -> float:
        """The sum of one of the tables along a text: its reward, say, or its log-probability."""
        return float(sum(table[state][token] for state, token in self.steps(text)))

    def advantages(self, state: Text) -> Tensor:
        """beta log(policy / reference) of every token: float64 [V]."""
        return self.beta * (self.log_policy[state] - self.log_ref[state])

    def value_differences(self, state: Text) -> Tensor:
        """V(s a) - V(s) of every token: float64 [V]; what an implicit reward holds besides the reward."""
        below = [self.values[(*state, token)] for token in range(self.vocab)]
        return torch.tensor(below, dtype=torch.float64) - self.values[state]


@dataclass(frozen=True)
class Recovery:
    """What DPO on exact preferences came to.

    Attributes:
        log_policy: of every state that goes on, float64 [V].
        steps: at which `errors` were taken.
        errors: largest difference between the probabilities of DPO's policy and of the optimum, over all states.
    """

    log_policy: dict[Text, Tensor]
    steps: list[int]
    errors: list[float]


def recover_by_dpo(solver: SoftQSolver, steps: int = 600, every: int = 20, seed: int = 0) -> Recovery:
    """Fit a table by DPO on all pairs of texts, with the Bradley-Terry probabilities of their rewards as labels.

    The loss sees whole texts only; that the table comes to agree with the optimum at every token is the claim.

    Args:
        steps: of Adam, at least 1; every so many (`every`) the error is taken.
        seed: of the table's random start.
    """
    if steps < 1 or every < 1:
        raise InputError(f"steps, every: {steps} and {every} must be at least 1")
    states = list(solver.log_policy)
    number = {state: place for place, state in enumerate(states)}
    texts = solver.texts()
    log_ref = torch.stack([solver.log_ref[state] for state in states])
    best = torch.stack([solver.log_policy[state] for state in states]).exp()
    through = torch.zeros(len(texts), len(states), solver.vocab, dtype=torch.float64)
    for row, text in enumerate(texts):
        for state, token in solver.steps(text):
            through[row, number[state], token] = 1
    rewards = torch.tensor([solver.total(solver.rewards, text) for text in texts], dtype=torch.float64)
    one, other = torch.tensor(list(itertools.combinations(range(len(texts)), 2))).T
    labels = torch.sigmoid(rewards[one] - rewards[other])
    start = torch.randn(log_ref.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = nn.Parameter(log_ref + start)
    optimizer = torch.optim.Adam([table], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    taken, errors = [], []
    for step in range(steps + 1):
        log_p = torch.log_softmax(table, -1)
        if step % every == 0 or step == steps:
            taken.append(step)
            errors.append(float((log_p.detach().exp() - best).abs().max()))
        if step == steps:
            break
        implicit = solver.beta * torch.einsum("nsv,sv->n", through, log_p - log_ref)
        margin = implicit[one] - implicit[other]
        loss = -(labels * logsigmoid(margin) + (1 - labels) * logsigmoid(-margin)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = torch.log_softmax(table.detach(), -1)
    return Recovery({state: found[place] for state, place in number.items()}, taken, errors)
