"""Search over a DPO policy: beams and Monte-Carlo trees scored by likelihoods, without a value network
(2404.12358).

For the optimum of a reward r, a text y up to its k-th token has

    sum_{t < k} [r + beta log ref] + V(y_<k) - V(empty) = beta log policy(y_<k)

so that ranking beams by reward so far, price of leaving the reference and value is ranking them by likelihood
under the policy. Two scorers are offered, and are not the same:

    "policy"     sum log policy                       the objective that DPO regularises; plain beam search, whose
                                                      texts are those of `model.generate(num_beams=k)`
    "implicit"   sum beta log(policy / reference)     reward and value without that price; rewards what the
                                                      reference finds unlikely, so candidates are its top-p only

    found = beam_search(Session(policy), ids, beams=5, max_new_tokens=32, stop_ids=stops)
    found.best.token_ids

Texts are paths of one token tree in a Session, and the reference, where there is one, reads the same tree. Sums
are not divided by length: that would break the equivalence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.align.contract import check_positive
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine
from tokenworks.core.trace import Trace
from tokenworks.core.tree import ROOT, TokenTree, TreeShape

Scorer = Literal["policy", "implicit"]

SCORERS = ("policy", "implicit")


@dataclass(frozen=True)
class Hypothesis:
    """A text and what it is worth.

    Attributes:
        log_p, log_ref: of each token, in nats; `log_ref` is empty without a reference.
        score: what it is ranked by.
        slot: the node of the tree that it ends at.
    """

    token_ids: tuple[int, ...] = ()
    log_p: tuple[float, ...] = ()
    log_ref: tuple[float, ...] = ()
    score: float = 0.0
    slot: int = ROOT


@dataclass
class Found:
    """What a search found.

    Attributes:
        texts: the best first; whole ones, that is, ended or of the greatest length.
        beta: of the rewards.
        passes: of each model, the one over the prompt included.
        exhausted: every text that the candidates allow was looked at, so that the first is the best of all.
    """

    texts: list[Hypothesis] = field(default_factory=list)
    beta: float = 0.1
    passes: int = 0
    exhausted: bool = False

    @property
    def best(self) -> Hypothesis:
        return self.texts[0]

    def token_rewards(self, text: Hypothesis) -> list[float]:
        """beta log(policy / reference) of each token; empty without a reference."""
        return [self.beta * (p - q) for p, q in zip(text.log_p, text.log_ref, strict=False)]

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """The best text: what its tokens added, and how far ahead of the runner-up it was."""
        trace = Trace.from_ids(self.best.token_ids, tokenizer)
        if self.best.log_ref:
            rewards = self.token_rewards(self.best)
            widest = max(map(abs, rewards)) or 1.0
            trace.add("reward", rewards, "beta log(policy / reference), in nats", -widest, widest)
            trace.add("log_ref", self.best.log_ref, "under the reference, in nats")
        trace.add("log_p", self.best.log_p, "under the policy, in nats")
        shared = [
            float(sum(text.token_ids[: place + 1] == self.best.token_ids[: place + 1] for text in self.texts))
            for place in range(len(self.best.token_ids))
        ]
        trace.add("shared", shared, "of the texts that were found, how many begin like this", 0, len(self.texts))
        trace.meta |= {"score": self.best.score, "texts": len(self.texts), "passes": self.passes}
        return trace


class Scored:
    """A policy and perhaps its reference over one token tree.

    Args:
        beta: above 0; scales rewards.
        top_p: with scorer "implicit", candidates are the smallest set of tokens that hold so much of the
            reference's probability. 1 takes all.

    Raises:
        InputError: no such scorer, scorer "implicit" without a reference, vocabularies that differ, or a number
            out of range.
    """

    def __init__(
        self, policy: Engine, reference: Engine | None, scorer: Scorer, beta: float, top_p: float
    ) -> None:
        check_positive(beta=beta)
        if scorer not in SCORERS:
            raise InputError(f"scorer: no {scorer!r}; there are {', '.join(SCORERS)}")
        if scorer == "implicit" and reference is None:
            raise InputError('reference: scorer "implicit" compares with one; give its Session')
        if reference is not None and reference.vocab_size != policy.vocab_size:
            raise InputError(
                f"reference: it knows {reference.vocab_size} tokens and the policy {policy.vocab_size}; both must "
                "come from the same model"
            )
        self.policy, self.reference, self.scorer, self.beta = policy, reference, scorer, beta
        self._floor = Sampling(1.0, top_p=top_p)
        self._nodes = self.passes = 0

    def begin(self, prompt: Sequence[int] | Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor, int]:
        """Read a prompt: log-probabilities [1, V] of both models (of the policy twice without a reference), and
        the most tokens that a text may have."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        self._nodes, self.passes, rows, limit = 0, 1, [], max_new_tokens
        for session in self._sessions:
            session.rollback(0)
            rows.append(torch.log_softmax(session.prefill(prompt)[None].float(), -1))
            # The last token needs no slot of the cache, as nothing is read after it.
            limit = min(limit, session.context_limit - session.length + 1)
        return rows[0], rows[-1], limit

    def read(self, texts: Sequence[Hypothesis]) -> tuple[list[Hypothesis], Tensor, Tensor]:
        """One pass over the newest tokens: the texts at their new nodes, and log-probabilities [n, V] after
        them."""
        shape = TreeShape(tuple(text.slot for text in texts), self._nodes)
        tree = TokenTree(torch.tensor([text.token_ids[-1] for text in texts]), shape)
        rows = [torch.log_softmax(session.extend(tree).float(), -1) for session in self._sessions]
        moved = [replace(text, slot=self._nodes + place) for place, text in enumerate(texts)]
        self._nodes += len(texts)
        self.passes += 1
        return moved, rows[0], rows[-1]

    def end(self) -> None:
        for session in self._sessions:
            session.rollback()

    def gains(self, log_p: Tensor, log_ref: Tensor) -> Tensor:
        """What each token would add to a text's score: float [n, V], -inf where it is no candidate."""
        if self.scorer == "policy":
            return log_p
        allowed = self._floor.distribution(log_ref) > 0
        return torch.where(allowed, self.beta * (log_p - log_ref), -torch.inf)

    def grown(self, text: Hypothesis, token: int, score: float, log_p: Tensor, log_ref: Tensor) -> Hypothesis:
        """A text with one more token, given the rows [V] before it."""
        under = (float(log_ref[token]),) if self.reference is not None else ()
        return Hypothesis(
            (*text.token_ids, token), (*text.log_p, float(log_p[token])), (*text.log_ref, *under), score, text.slot
        )

    @property
    def _sessions(self) -> list[Engine]:
        return [self.policy] if self.reference is None else [self.policy, self.reference]


@torch.inference_mode()
def beam_search(
    policy: Engine,
    prompt: Sequence[int] | Tensor,
    beams: int = 5,
    max_new_tokens: int = 64,
    stop_ids: Iterable[int] = (),
    reference: Engine | None = None,
    scorer: Scorer = "policy",
    beta: float = 0.1,
    top_p: float = 0.95,
) -> Found:
    """Continue `prompt`, keeping the `beams` texts of the highest score.

    A text that ends, among the best, is finished. With scorer "policy" the search is over when no running text is
    better than the last of as many finished ones, as a score can only fall; with "implicit" it goes to the end, as
    a token may add to it.

    Args:
        beams: at least 1, which is greedy decoding under scorer "policy". With as many as there are texts the
            first is the best of all.
        reference, scorer, beta, top_p: see `Scored`. A reference with scorer "policy" only gives rewards.

    Raises:
        InputError: a number out of range, an empty prompt, no room, or as `Scored`.
        NumericalError: a model returned NaN.
    """
    if beams < 1:
        raise InputError(f"beams: {beams} is not at least 1")
    stops = frozenset(stop_ids)
    models = Scored(policy, reference, scorer, beta, top_p)
    log_p, log_ref, limit = models.begin(prompt, max_new_tokens)
    running, found = [Hypothesis()], Found(beta=beta)
    for length in range(1, limit + 1):
        grown = _best_grown(models, running, log_p, log_ref, max(2, 1 + len(stops)) * beams)
        over = [length == limit or text.token_ids[-1] in stops for text in grown]
        ended = [text for text, done in list(zip(grown, over, strict=True))[:beams] if done]
        found.texts = sorted([*found.texts, *ended], key=lambda text: -text.score)[:beams]
        running = [text for text, done in zip(grown, over, strict=True) if not done][:beams]
        settled = scorer == "policy" and len(found.texts) == beams and running and (
            running[0].score <= found.texts[-1].score
        )  # fmt: skip
        if not running or settled:
            break
        running, log_p, log_ref = models.read(running)
    models.end()
    found.passes = models.passes
    return found


def _best_grown(
    models: Scored, running: list[Hypothesis], log_p: Tensor, log_ref: Tensor, width: int
) -> list[Hypothesis]:
    """The best texts of one more token."""
    scores = models.gains(log_p, log_ref) + torch.tensor([[text.score] for text in running])
    best = scores.flatten().topk(min(width, scores.numel()))
    grown = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        row, token = divmod(index, log_p.shape[1])
        if score > -torch.inf:
            grown.append(models.grown(running[row], token, score, log_p[row], log_ref[row]))
    return grown
