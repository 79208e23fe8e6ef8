"""Beam search: several texts side by side, the likeliest kept. What AdaDec is measured against.

    result = BeamSearch(Session(loaded.model), beams=3).generate(prompt_ids, 128, stop_ids)

The same texts as `model.generate(num_beams=3, do_sample=False)` of transformers, whose rules are these. A beam
that ends leaves the race with its mean log-probability, if it was among the best. The rest go on until the mean of
the leader is no better than that of the last of as many finished ones. All beams are paths of one token tree under
the prompt, so that one pass runs them all and nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.session import Engine
from tokenworks.core.tree import ROOT, TokenTree, TreeShape
from tokenworks.decode.adadec import Stop


@dataclass(frozen=True)
class Beam:
    """One text: its tokens, their summed log-probability, and the tree's node that it ends at."""

    token_ids: tuple[int, ...] = ()
    log_p: float = 0.0
    slot: int = ROOT

    @property
    def score(self) -> float:
        """Mean log-probability of a token."""
        return self.log_p / len(self.token_ids)


@dataclass
class BeamGeneration:
    """What one call of `generate` produced.

    Attributes:
        token_ids: of the best text, up to and including its stop token.
        beams: the finished texts, the best first.
        finish_reason: "stop", "length" or "context", of the best text.
        target_passes: forward passes, the one over the prompt included.
        nodes: tokens that those passes ran, the prompt's left out.
        seconds: wall time, the prompt's pass included.
    """

    token_ids: list[int] = field(default_factory=list)
    beams: list[Beam] = field(default_factory=list)
    finish_reason: str = "length"
    target_passes: int = 0
    nodes: int = 0
    seconds: float = 0.0


class BeamSearch:
    """Keep the likeliest `beams` texts at every step.

    Args:
        session: the model's; a generation starts it anew.
        beams: at least 1, which is greedy decoding.

    Raises:
        InputError: `beams` is out of range.
    """

    def __init__(self, session: Engine, beams: int = 3) -> None:
        if not 1 <= beams <= session.vocab_size:
            raise InputError(f"beams: {beams} is not between 1 and the {session.vocab_size} tokens")
        self.session, self.beams = session, beams

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        stop_ids: Iterable[int] = (),
        stop: Stop | None = None,
    ) -> BeamGeneration:
        """Continue `prompt`; the arguments are those of `AdaDec.generate`.

        Raises:
            InputError: an empty prompt, a batch, a prompt longer than the context, `max_new_tokens` below 1.
            NumericalError: the model returned NaN.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        stops = frozenset(stop_ids)
        session, begun, found = self.session, time.perf_counter(), BeamGeneration(target_passes=1)
        session.rollback(0)
        running, rows = [Beam()], session.prefill(prompt)[None]
        # The last token needs no slot of the cache, as nothing is read after it.
        limit = min(max_new_tokens, session.context_limit - session.length + 1)
        # As many as can end at a step, and as many again that do not.
        width = min(max(2, 1 + len(stops)) * self.beams, self.beams * session.vocab_size)
        for length in range(1, limit + 1):
            grown = self._grown(running, rows, width)
            done = [
                length == limit or beam.token_ids[-1] in stops or (stop is not None and stop(beam.token_ids))
                for beam in grown
            ]
            ended = [beam for beam, over in list(zip(grown, done, strict=True))[: self.beams] if over]
            found.beams = sorted([*found.beams, *ended], key=lambda beam: -beam.score)[: self.beams]
            running = [beam for beam, over in zip(grown, done, strict=True) if not over][: self.beams]
            if not running or (len(found.beams) == self.beams and running[0].score <= found.beams[-1].score):
                break
            running, rows = self._run(running, found.nodes)
            found.target_passes += 1
            found.nodes += len(running)
        session.rollback()
        best = found.beams[0]
        found.token_ids = list(best.token_ids)
        if found.token_ids[-1] in stops or (stop is not None and stop(found.token_ids)):
            found.finish_reason = "stop"
        elif limit < max_new_tokens:
            found.finish_reason = "context"
        found.seconds = time.perf_counter() - begun
        return found

    @staticmethod
    def _grown(running: list[Beam], rows: Tensor, width: int) -> list[Beam]:
        """The likeliest texts of one more token, from the logits [n, V] after each of the running ones."""
        log_p = torch.log_softmax(rows.float(), -1) + torch.tensor([[beam.log_p] for beam in running])
        best = log_p.flatten().topk(min(width, log_p.numel()))
        vocabulary = rows.shape[1]
        grown = []
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            beam = running[index // vocabulary]
            grown.append(Beam((*beam.token_ids, index % vocabulary), value, beam.slot))
        return grown

    def _run(self, running: list[Beam], first: int) -> tuple[list[Beam], Tensor]:
        """One pass over the newest tokens: the beams at their new nodes, and the logits after them."""
        newest = torch.tensor([beam.token_ids[-1] for beam in running])
        shape = TreeShape(tuple(beam.slot for beam in running), first)
        rows = self.session.extend(TokenTree(newest, shape))
        return [Beam(b.token_ids, b.log_p, first + n) for n, b in enumerate(running)], rows
