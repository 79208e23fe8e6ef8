"""SpeculativeDecoder: Session x Drafter x Verifier -> Generation. The loop that all lossless decoders share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine
from tokenworks.core.text import one_prompt
from tokenworks.core.trace import Trace
from tokenworks.decode.contract import Autoregressive, Draft, Drafter, Law, TokenMatching, Verdict, Verifier


@dataclass
class Generation:
    """What one call of `generate` produced, and how.

    Attributes:
        token_ids: the new tokens only, up to and including the first stop token.
        finish_reason: "stop" (a stop token), "length" (max_new_tokens) or "context" (the model's context is full).
        accepted: for each pass of the decoding loop, the tokens it confirmed: accepted draft tokens and the bonus.
        seconds: wall time, the prompt's pass included.
        steps: for each new token where it came from (see `trace`).
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)

    @property
    def target_passes(self) -> int:
        """Forward passes of the target model, the one over the prompt included."""
        return 1 + len(self.accepted)

    @property
    def mean_accepted(self) -> float:
        """Tokens confirmed by a pass of the decoding loop, on average (plain decoding: 1); NaN without passes."""
        return sum(self.accepted) / len(self.accepted) if self.accepted else float("nan")

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else float("nan")

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """The new tokens with what was decided at each: who wrote it, in which pass, how sure the target was."""
        trace = Trace.from_ids(self.token_ids, tokenizer)
        steps = self.steps
        trace.add("source", [s.source for s in steps], "who proposed the token; 'target' wrote it itself")
        trace.add("probability", [s.probability for s in steps], "of the token under the target, unwarped", 0, 1)
        trace.add("entropy", [s.entropy for s in steps], "of the target's distribution at this token, in bits")
        trace.add(
            "acceptance", [s.chance for s in steps], "probability with which the draft token was accepted", 0, 1
        )
        trace.add("depth", [s.depth for s in steps], "level of the draft tree the token came from; 0 is no draft")
        trace.add("rank", [s.rank for s in steps], "place of the token among its siblings in the tree, 0 first")
        trace.add(
            "pass", [s.number for s in steps], "forward pass of the target that confirmed it; 0 is the prompt's"
        )
        trace.meta |= {
            "finish_reason": self.finish_reason,
            "target_passes": self.target_passes,
            "accepted": self.accepted,
            "seconds": self.seconds,
        }
        return trace


@dataclass(frozen=True)
class Step:
    """Where one new token came from."""

    source: str
    probability: float
    entropy: float
    chance: float | None
    depth: int
    rank: int | None
    number: int


class SpeculativeDecoder:
    """Decode with one target pass a tree.

    Args:
        session: the target model's `Session`; a generation starts it anew.
        drafter: by default `Autoregressive`, plain decoding.
        verifier: by default `TokenMatching`, exact for every drafter.
        sampling: by default greedy.

    Raises:
        InputError: the verifier is not exact for the way this drafter draws.
    """

    def __init__(
        self,
        session: Engine,
        drafter: Drafter | None = None,
        verifier: Verifier | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.session = session
        self.drafter: Drafter = drafter if drafter is not None else Autoregressive()
        self.verifier: Verifier = verifier if verifier is not None else TokenMatching()
        self.sampling = sampling if sampling is not None else Sampling()
        if self.drafter.law not in self.verifier.laws:
            raise InputError(
                f"verifier: {self.verifier.name} is not exact for {self.drafter.name}, whose tree holds "
                f"{self.drafter.law.value}; it needs {_or(self.verifier.laws)}. token-matching is exact for any"
            )

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        seed: int | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Generation:
        """Continue `prompt`.

        Args:
            prompt: at least one token id; a batch is refused.
            max_new_tokens: at least 1; never exceeded, whatever a pass accepts.
            stop_ids: generation ends with the first of these, which is kept.
            seed: of the draws when sampling; None takes PyTorch's own state.
            on_tokens: called with the newly confirmed ids after each pass.

        Raises:
            InputError: an empty prompt, a batch, a prompt longer than the context, `max_new_tokens` below 1.
            NumericalError: the model returned NaN.
        """
        ids = one_prompt(prompt, self.session.context_limit)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        stops = frozenset(stop_ids)
        session, begun, result = self.session, time.perf_counter(), Generation()
        session.rollback(0)

        generator = None if seed is None else torch.Generator(session.device).manual_seed(seed)
        logits = session.prefill(ids, self.drafter.start(ids, self.sampling, generator))[None]
        verdict = Verdict([0], self.sampling.draw(logits[0], generator), [])
        new, steps = [verdict.bonus], self._steps(None, logits, verdict, 0)
        while True:
            finish = self._keep(result, new, steps, max_new_tokens, stops)
            result.seconds = time.perf_counter() - begun
            if on_tokens is not None and new:
                on_tokens(result.token_ids[-len(new) :])
            if finish or session.length >= session.context_limit:
                result.finish_reason = finish or "context"
                return result
            context = ids + result.token_ids
            room = min(max_new_tokens - len(result.token_ids) - 1, session.context_limit - len(context))
            draft = self.drafter.propose(context, room)
            logits = session.extend(draft.tree)
            verdict = self.verifier.verify(draft, logits, self.sampling, generator)
            session.commit(verdict.path)
            self.drafter.observe(draft, logits, verdict)
            new = [int(draft.tree.tokens[node]) for node in verdict.path[1:]] + [verdict.bonus]
            result.accepted.append(len(new))
            steps = self._steps(draft, logits, verdict, len(result.accepted))

    @staticmethod
    def _keep(
        result: Generation, new: list[int], steps: list[Step], limit: int, stops: frozenset[int]
    ) -> str | None:
        """Cut `new` at the first stop token and at the limit, keep it, and say why to finish, if so."""
        stop = next((i for i, token in enumerate(new) if token in stops), None)
        end = min(len(new) if stop is None else stop + 1, limit - len(result.token_ids))
        del new[end:]
        result.token_ids += new
        result.steps += steps[:end]
        if new and new[-1] in stops:
            return "stop"
        return "length" if len(result.token_ids) >= limit else None

    def _steps(self, draft: Draft | None, logits: Tensor, verdict: Verdict, number: int) -> list[Step]:
        """A Step for each accepted draft token and for the bonus; `logits` [N, V] at the nodes of the tree."""
        rows = torch.log_softmax(logits[verdict.path], dim=-1)
        bits = (-(rows.exp() * rows.clamp(min=torch.finfo(rows.dtype).min)).sum(-1) / math.log(2)).tolist()
        steps = []
        for depth, node in enumerate(verdict.path[1:], start=1):
            assert draft is not None
            rank = draft.tree.shape.children[verdict.path[depth - 1]].index(node)
            chance = float(rows[depth - 1, draft.tree.tokens[node]].exp())
            steps.append(
                Step(self.drafter.name, chance, bits[depth - 1], verdict.chances[depth - 1], depth, rank, number)
            )
        chance = float(rows[-1, verdict.bonus].exp())
        return [*steps, Step("target", chance, bits[-1], None, 0, None, number)]


def _or(laws: Iterable[Law]) -> str:
    return " or ".join(sorted(law.value for law in laws))
