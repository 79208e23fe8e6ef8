"""ASSD, any-subset speculative decoding (Guo and Ermon, arXiv 2504.20456): a model that checks its own drafts.

An any-subset model drafts k holes in one pass, each as if the others of them were not there, and one more pass
gives the exact probability of each draft given those before it. Drafts are then accepted or resampled as in
speculative sampling, with P the draft and Q the oracle:

    y_j ~ P_j              for the next k holes, from one pass (or from counts of bigrams, from none)
    accept y_j with probability min(1, Q_j(y_j) / P_j(y_j)); at the first refusal draw from norm(max(Q_j - P_j, 0))

The filling follows the model's joint density. The first draft of a pass is always accepted, since P_0 = Q_0, so
two passes decide at least two holes; the last hole alone needs one. There are never more passes than holes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.sampling import Sampling
from tokenworks.core.trace import Trace
from tokenworks.decode.any_subset import AnySubsetLM, draft_mask, lattice_order, oracle_mask
from tokenworks.decode.speculative_sampling import pick, residual, uniform

DraftKind = Literal["self", "bigram", "none"]


@dataclass(frozen=True)
class Decision:
    """How one hole was filled.

    Attributes:
        position: of the hole.
        source: "draft" (accepted), "resampled", or "model" (drawn from its exact conditional, without a draft).
        acceptance: the probability with which its draft was accepted; None without a draft that was tested.
        log_prob: in nats, of its token given the visible tokens and the holes before it, at temperature 1.
        evaluation: number of the pass after which it stood, from 1.
    """

    position: int
    source: str
    acceptance: float | None
    log_prob: float
    evaluation: int


@dataclass
class Infilling:
    """A text whose holes have been filled.

    Attributes:
        token_ids: [N].
        evaluations: network function evaluations (NFE), forward passes of the model.
        accepted: for each round of draft and check the holes it decided.
        decisions: for each hole, in the order in which they were filled.
    """

    token_ids: list[int]
    evaluations: int = 0
    accepted: list[int] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def log_prob(self) -> float:
        """Of the whole filling under the model's joint density, in nats, at temperature 1."""
        return sum(decision.log_prob for decision in self.decisions)

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """The whole text with what was decided at each hole; visible tokens have the source "given"."""
        trace, at = Trace.from_ids(self.token_ids, tokenizer), {d.position: d for d in self.decisions}
        found = [at.get(position) for position in range(len(self.token_ids))]
        trace.add("source", [d.source if d else "given" for d in found], "who chose the token")
        trace.add(
            "probability",
            [None if d is None else float(torch.tensor(d.log_prob).exp()) for d in found],
            "of the token given the visible ones and the holes before it",
            0,
            1,
        )
        trace.add(
            "acceptance",
            [None if d is None else d.acceptance for d in found],
            "probability with which the draft was accepted",
            0,
            1,
        )
        trace.add(
            "pass",
            [None if d is None else d.evaluation for d in found],
            "forward pass after which the token stood",
        )
        trace.meta |= {"evaluations": self.evaluations, "accepted": self.accepted, "log_prob": self.log_prob}
        return trace


class Bigrams:
    """Counts of neighbours among the tokens known so far; the draft that costs no pass.

    Args:
        known: int64 [N] tokens.
        visible: bool [N], which of them count.
        vocab_size: V.
    """

    def __init__(self, known: Tensor, visible: Tensor, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokens: list[int | None] = [
            int(token) if flag else None for token, flag in zip(known, visible, strict=True)
        ]
        self.single: Counter[int] = Counter(token for token in self._tokens if token is not None)
        self.pairs: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for left, right in zip(self._tokens, self._tokens[1:], strict=False):
            if left is not None and right is not None:
                self.pairs[left][right] += 1

    def add(self, position: int, token: int) -> None:
        """A hole has been decided: it counts, and so do its bigrams with neighbours that are known."""
        self._tokens[position] = token
        self.single[token] += 1
        before = self._tokens[position - 1] if position else None
        after = self._tokens[position + 1] if position + 1 < len(self._tokens) else None
        if before is not None:
            self.pairs[before][token] += 1
        if after is not None:
            self.pairs[token][after] += 1

    def distribution(self, left: int) -> Tensor:
        """Of the token after `left`: float64 [V]; that of single tokens if nothing is known to follow it."""
        counts = self.pairs[left] if self.pairs.get(left) else self.single
        p = torch.zeros(self.vocab_size, dtype=torch.float64)
        p[list(counts)] = torch.tensor(list(counts.values()), dtype=torch.float64)
        return p / p.sum()


def joint_log_prob(model: AnySubsetLM, tokens: Sequence[int] | Tensor, holes: Sequence[int]) -> float:
    """log p(tokens at `holes` | the others) in nats, from one pass.

    Args:
        tokens: [N], complete.
        holes: positions, at least one, not all.

    Raises:
        InputError: tokens or holes that do not fit the model or each other.
    """
    ids = torch.as_tensor(tokens)
    hidden = torch.zeros(len(ids), dtype=torch.bool)
    if not holes or not 0 <= min(holes) <= max(holes) < len(ids):
        raise InputError(f"holes: {list(holes)} are not positions of a text of {len(ids)} tokens")
    hidden[list(holes)] = True
    _check(model, ids.masked_fill(hidden, model.mask_token_id))
    if (ids == model.mask_token_id).any():
        raise InputError("tokens: a mask is left in them; the density is that of a complete text")
    rank, start = lattice_order(hidden)
    targets = hidden.nonzero()[:, 0]
    log_p = torch.log_softmax(_logits(model, ids, oracle_mask(rank, start), targets), -1)
    return float(log_p[torch.arange(len(targets)), ids[targets]].sum())


def infill(
    model: AnySubsetLM,
    tokens: Sequence[int] | Tensor,
    k: int = 5,
    draft: DraftKind = "self",
    sampling: Sampling | None = None,
    seed: int | None = None,
    on_tokens: Callable[[list[tuple[int, int]]], None] | None = None,
) -> Infilling:
    """Fill the holes of a text with a draw from the model's joint density.

    Args:
        tokens: [N], with the model's `mask_token_id` in the holes. Without holes it comes back as it is.
        k: holes drafted in a round, at least 1.
        draft: "self", the model's own parallel draft; "bigram", counts of what is known, which need no pass;
            "none", one hole after another.
        sampling: by default temperature 1. The guarantee is for the joint of the warped conditionals.
        seed: of the draws; None takes PyTorch's own state.
        on_tokens: called with the newly decided (position, token) after each round.

    Raises:
        InputError: a batch, no visible token, a text that is too long, an id outside the vocabulary, k below 1, or
            no such draft.
        NumericalError: the model returned NaN.
    """
    ids = torch.as_tensor(tokens)
    hidden = _check(model, ids)
    if k < 1:
        raise InputError(f"k: {k} is not at least 1")
    if draft not in ("self", "bigram", "none"):
        raise InputError(f"draft: there is no {draft!r}; choose self, bigram or none")
    chance = None if seed is None else torch.Generator().manual_seed(seed)
    filling = _Filling(model, ids.clone(), hidden, sampling or Sampling(1.0), chance)
    bigrams = Bigrams(ids, ~hidden, model.vocab_size) if draft == "bigram" else None
    while filling.decided < len(ids):
        slots = filling.next_holes(1 if draft == "none" else k)
        first = len(filling.found.decisions)
        # The first position of a text has no left neighbour to count.
        if bigrams is None or slots[0] == 0:
            filling.by_itself(slots)
        else:
            filling.by_bigrams(slots, bigrams)
        new = [(d.position, int(filling.ids[d.position])) for d in filling.found.decisions[first:]]
        for position, token in new:
            if bigrams is not None:
                bigrams.add(position, token)
        filling.found.accepted.append(len(new))
        if on_tokens is not None:
            on_tokens(new)
    filling.found.token_ids = filling.ids.tolist()
    return filling.found


class _Filling:
    """A text under way: `ids` has masks in the holes of rank `decided` and above."""

    def __init__(
        self,
        model: AnySubsetLM,
        ids: Tensor,
        hidden: Tensor,
        sampling: Sampling,
        chance: torch.Generator | None,
    ) -> None:
        self.ids, self.found = ids, Infilling([])
        self._model, self._sampling, self._chance = model, sampling, chance
        self._rank, self._start = lattice_order(hidden)
        self._order = self._rank.argsort()
        self.decided = self._start

    def next_holes(self, count: int) -> list[int]:
        found: list[int] = self._order[self.decided : self.decided + count].tolist()
        return found

    def by_itself(self, slots: list[int]) -> None:
        """One round with the model's own draft."""
        mask = draft_mask(self._rank, self._start, self.decided)
        logits = self._run(self.ids, mask, slots)
        drafts = self._sampling.distribution(logits).double()
        drawn = [pick(p, self._chance) for p in drafts]
        if len(slots) == 1:  # its conditional is exact: nothing to check
            self._decide(slots[0], drawn[0], "model", None, logits[0])
            return
        self._check(slots, drawn, drafts)

    def by_bigrams(self, slots: list[int], bigrams: Bigrams) -> None:
        """One round with drafts from counts; each is drawn given its left neighbour, known or just drawn."""
        drafts: list[Tensor] = []
        drawn: list[int] = []
        for slot in slots:
            left = drawn[-1] if drawn and slot - 1 == slots[len(drawn) - 1] else int(self.ids[slot - 1])
            drafts.append(bigrams.distribution(left))
            drawn.append(pick(drafts[-1], self._chance))
        self._check(slots, drawn, drafts)

    def _check(self, slots: list[int], drawn: list[int], drafts: Sequence[Tensor] | Tensor) -> None:
        complete = self.ids.clone()
        complete[slots] = torch.tensor(drawn)
        logits = self._run(complete, oracle_mask(self._rank, self._start), slots)
        oracle = self._sampling.distribution(logits).double()
        for j, (slot, y) in enumerate(zip(slots, drawn, strict=True)):
            accept = min(1.0, float(oracle[j, y] / drafts[j][y]))
            if uniform(self._chance, oracle.device) < accept:
                self._decide(slot, y, "draft", accept, logits[j])
            else:
                y = pick(residual(oracle[j], drafts[j]), self._chance)
                self._decide(slot, y, "resampled", None, logits[j])
                return

    def _run(self, ids: Tensor, mask: Tensor, slots: list[int]) -> Tensor:
        self.found.evaluations += 1
        return _logits(self._model, ids, mask, torch.tensor(slots))

    def _decide(self, slot: int, token: int, source: str, acceptance: float | None, logits: Tensor) -> None:
        self.ids[slot] = token
        self.decided += 1
        log_prob = float(torch.log_softmax(logits, -1)[token])
        self.found.decisions.append(Decision(slot, source, acceptance, log_prob, self.found.evaluations))


def _logits(model: AnySubsetLM, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Of complete texts: a mask is no token that a hole may be filled with."""
    logits = model.logits(ids, mask, targets)
    logits[:, model.mask_token_id] = -torch.inf
    if torch.isnan(logits).any():
        raise NumericalError("model: it returned NaN logits; check its weights, or load it in float32")
    return logits


def _check(model: AnySubsetLM, ids: Tensor) -> Tensor:
    """Which positions are holes, bool [N]; raises `InputError` for what cannot be filled."""
    if ids.dim() != 1 or ids.is_floating_point():
        raise InputError(f"tokens: expected one text [N] of ids, got {list(ids.shape)}; fill one text at a time")
    if not 0 < len(ids) <= model.max_length:
        raise InputError(f"tokens: {len(ids)} of them; the model reads 1 to {model.max_length}")
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise InputError(f"tokens: an id is outside the model's vocabulary of {model.vocab_size}")
    hidden = ids == model.mask_token_id
    if hidden.all():
        raise InputError("tokens: every one is a hole; give at least one visible token")
    return hidden
