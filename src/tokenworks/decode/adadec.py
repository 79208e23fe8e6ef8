"""AdaDec (arXiv 2506.08980): greedy decoding that stops to think where the model is unsure.

    decode = AdaDec(Session(loaded.model), load_threshold(loaded))
    result = decode.generate(prompt_ids, 128, stop_ids)
    result.trace(tokenizer)                     # where it paused, and what it weighed there

Where the entropy H of the next token is below the threshold, the likeliest token is taken. Elsewhere each of the B
likeliest is continued greedily by up to L tokens, and the one with the best mean log-probability wins:

    score(c) = (log p(c) + sum of its continuation's n log-probabilities) / (n + 1)

Only that token is kept; what follows it is decided again. The B continuations are branches of one token tree, so
looking ahead takes L passes over at most B tokens, and as far as the decisions follow the winner's branch, which
greedy steps do, its passes need not be run again. The tokens are those of the method without this economy.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.session import Engine
from tokenworks.core.trace import Trace
from tokenworks.core.tree import ROOT, TokenTree, TreeShape
from tokenworks.decode.adadec_threshold import EntropyThreshold, entropy

Pause = Callable[[float], bool]
"""Takes an entropy in nats and says whether to look ahead."""

Stop = Callable[[Sequence[int]], bool]
"""Takes the new token ids so far and says whether the text is complete. See `stop_on_text`."""


@dataclass(frozen=True)
class Weighed:
    """A candidate at a pause.

    Attributes:
        token: its id.
        log_p: log p(token).
        score: the mean that it is judged by.
        ahead: n, the tokens of its continuation that count.
    """

    token: int
    log_p: float
    score: float
    ahead: int


@dataclass(frozen=True)
class Decision:
    """How one token came about.

    Attributes:
        entropy: before it, in nats.
        probability: of the token.
        candidates: what was weighed, the likeliest first; empty where the method did not pause.
        rank: of the token among them; 0 is what greedy decoding would have taken.
        free: whether a look ahead had already run the pass that this decision needed.
    """

    entropy: float
    probability: float
    candidates: tuple[Weighed, ...]
    rank: int
    free: bool


@dataclass
class AdaDecGeneration:
    """What one call of `generate` produced, and how.

    Attributes:
        token_ids: the new tokens only, up to and including the first stop token.
        finish_reason: "stop" (a stop token, or the caller's rule), "length" or "context".
        target_passes: forward passes, the one over the prompt included.
        nodes: tokens that those passes ran, the prompt's left out.
        seconds: wall time, the prompt's pass included.
        steps: for each new token how it was decided.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    target_passes: int = 0
    nodes: int = 0
    seconds: float = 0.0
    steps: list[Decision] = field(default_factory=list)

    @property
    def pause_rate(self) -> float:
        """Share of the tokens at which it looked ahead."""
        return sum(bool(step.candidates) for step in self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else float("nan")

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """The new tokens with what was decided at each."""
        trace, steps = Trace.from_ids(self.token_ids, tokenizer), self.steps

        def words(step: Decision) -> str | None:
            listed = (f"{tokenizer.decode([c.token])!r} {c.score:.2f} ({c.ahead})" for c in step.candidates)
            return ", ".join(listed) or None

        ways = [("changed" if s.rank else "kept") if s.candidates else "greedy" for s in steps]
        trace.add("decision", ways, "greedy: taken at once; kept, changed: after looking ahead")
        trace.add("entropy", [s.entropy for s in steps], "before the token, in nats", 0)
        trace.add("probability", [s.probability for s in steps], "of the token under the model", 0, 1)
        trace.add(
            "candidates",
            [words(s) for s in steps],
            "what was weighed: mean log-probability, and (tokens looked ahead)",
        )
        trace.add(
            "run ahead", ["yes" if s.free else "no" for s in steps], "whether an earlier look had run its pass"
        )
        trace.meta |= {
            "finish_reason": self.finish_reason,
            "target_passes": self.target_passes,
            "pause_rate": self.pause_rate,
            "seconds": self.seconds,
        }
        return trace


class AdaDec:
    """Decode greedily, looking ahead where it is worth it.

    Args:
        session: the model's; a generation starts it anew.
        threshold: what `learn_threshold` found, or an entropy in nats: infinity is greedy decoding, 0 always looks
            ahead. Or a rule of your own, such as `random_pauses`.
        candidates: B, at least 1.
        lookahead: L, at least 0.

    Raises:
        InputError: a number out of range, or more candidates than the model has tokens.
    """

    def __init__(
        self,
        session: Engine,
        threshold: EntropyThreshold | float | Pause,
        candidates: int = 3,
        lookahead: int = 5,
    ) -> None:
        if not 1 <= candidates <= session.vocab_size:
            raise InputError(f"candidates: {candidates} is not between 1 and the {session.vocab_size} tokens")
        if lookahead < 0:
            raise InputError(f"lookahead: {lookahead} is negative")
        self.session, self.candidates, self.lookahead = session, candidates, lookahead
        self._pause = threshold if callable(threshold) else _above(threshold)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        stop: Stop | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> AdaDecGeneration:
        """Continue `prompt`.

        Args:
            prompt: at least one token id; a batch is refused.
            max_new_tokens: at least 1. Looking ahead may go beyond it.
            stop_ids: generation, and a look ahead, ends with the first of these.
            stop: the same for any rule; asked after every token.
            on_tokens: called with each new id as it is decided, in a list of one.

        Raises:
            InputError: an empty prompt, a batch, a prompt longer than the context, `max_new_tokens` below 1.
            NumericalError: the model returned NaN.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        ends = _ends(frozenset(stop_ids), stop)
        session, begun, result = self.session, time.perf_counter(), AdaDecGeneration(target_passes=1)
        session.rollback(0)
        logits = session.prefill(prompt)
        branch: list[tuple[int, Tensor]] = []  # nodes run ahead of the kept tokens, and the logits after each
        walked: list[int] = []  # nodes of the pending tree that were kept
        free = False
        while True:
            unsure = float(entropy(logits))
            weighed: tuple[Weighed, ...] = ()
            rank, token = 0, int(logits.argmax())
            if self._pause(unsure):
                session.commit(walked)
                walked = []
                weighed, branches = self._look_ahead(logits, result, ends)
                rank = max(range(len(weighed)), key=lambda number: weighed[number].score)
                token, branch = weighed[rank].token, branches[rank]
            result.token_ids.append(token)
            result.steps.append(Decision(unsure, float(logits.softmax(-1)[token]), weighed, rank, free))
            result.seconds = time.perf_counter() - begun
            if on_tokens is not None:
                on_tokens([token])
            full = session.length + len(walked) >= session.context_limit
            stopped = ends(result.token_ids)
            if stopped or full or len(result.token_ids) >= max_new_tokens:
                session.commit(walked)
                result.finish_reason = "stop" if stopped else "context" if full else "length"
                return result
            free = bool(branch)
            if branch:
                node, logits = branch.pop(0)
                walked.append(node)
            else:
                session.commit(walked)
                walked = []
                logits = session.extend([token])[0]
                session.commit()
                result.target_passes += 1
                result.nodes += 1

    def _look_ahead(
        self, logits: Tensor, result: AdaDecGeneration, ends: Stop
    ) -> tuple[tuple[Weighed, ...], list[list[tuple[int, Tensor]]]]:
        """The candidates with their scores, and for each the nodes that were run with the logits after them."""
        top = torch.log_softmax(logits.float(), -1).topk(self.candidates)
        tokens, log_p = top.indices.tolist(), top.values.tolist()
        texts = [[*result.token_ids, token] for token in tokens]
        sums, size = list(log_p), 0
        branches: list[list[tuple[int, Tensor]]] = [[] for _ in tokens]
        for _ in range(min(self.lookahead, self.session.context_limit - self.session.length)):
            # A branch whose text is complete is not continued: it is judged by what it has.
            growing = [number for number, text in enumerate(texts) if not ends(text)]
            if not growing:
                break
            above = tuple(branches[number][-1][0] if branches[number] else ROOT for number in growing)
            newest = torch.tensor([texts[number][-1] for number in growing])
            rows = self.session.extend(TokenTree(newest, TreeShape(above, size)))
            best = torch.log_softmax(rows, -1).max(-1)
            for place, number in enumerate(growing):
                branches[number].append((size + place, rows[place]))
                sums[number] += float(best.values[place])
                texts[number].append(int(best.indices[place]))
            size += len(growing)
            result.target_passes += 1
        result.nodes += size
        weighed = tuple(
            Weighed(token, p, total / (len(branch) + 1), len(branch))
            for token, p, total, branch in zip(tokens, log_p, sums, branches, strict=True)
        )
        return weighed, branches


def random_pauses(rate: float, seed: int | str = 0) -> Pause:
    """Pause at random, at `rate`: what the choice of places is worth is measured against this.

    Raises:
        InputError: a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate: {rate} is not between 0 and 1")
    chance = random.Random(seed)
    return lambda _: chance.random() < rate


def stop_on_text(tokenizer: PreTrainedTokenizerBase, complete: Callable[[str], bool]) -> Stop:
    """A stop rule on the text of the new tokens."""
    return lambda ids: complete(str(tokenizer.decode(list(ids), skip_special_tokens=True)))


def left_function(text: str) -> bool:
    """Whether code that continues a Python function's body has left it: a line that is not indented, or four
    blank ones (the authors' rule)."""
    lines = text.split("\n")
    if any(line.strip() and not line.startswith((" ", "\t")) for line in lines):
        return True
    return len(lines) >= 4 and not any(line.strip() for line in lines[-4:])


def function_body(text: str) -> str:
    """The lines of `text` before the first that is not indented."""
    lines = text.split("\n")
    end = next(
        (n for n, line in enumerate(lines) if line.strip() and not line.startswith((" ", "\t"))), len(lines)
    )
    return "\n".join(lines[:end]).rstrip() + "\n"


def _above(threshold: EntropyThreshold | float) -> Pause:
    tau = threshold.tau if isinstance(threshold, EntropyThreshold) else float(threshold)
    if math.isnan(tau):
        raise InputError("threshold: NaN is not an entropy; give a number of nats, or what learn_threshold found")
    return lambda unsure: not unsure < tau


def _ends(stops: frozenset[int], stop: Stop | None) -> Stop:
    return lambda ids: ids[-1] in stops or (stop is not None and stop(ids))
