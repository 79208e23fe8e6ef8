"""Every drafter with every verifier that fits it, on the same prompts in one run: which is fastest here?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from tokenworks.core.errors import InputError
from tokenworks.core.measure import Interval, paired, ratio_of_sums
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.registry import DRAFTERS, VERIFIERS, decoder
from tokenworks.decode.speculative import Generation, SpeculativeDecoder

PLAIN = "autoregressive"


@dataclass(frozen=True)
class GridRow:
    """What one pair did.

    Attributes:
        draft, verify: its parts.
        tokens_per_second: over all prompts.
        tokens_per_pass: new tokens over forward passes of the target, the prompt's included.
        draft_share: the share of new tokens that the draft proposed, in [0, 1].
        times_plain: speed against plain decoding, with a 95% interval over prompts.
        same_words: share of prompts with the text of plain decoding. Meant for greedy decoding; sampled texts
            differ by chance.
    """

    draft: str
    verify: str
    tokens_per_second: float
    tokens_per_pass: Interval
    draft_share: float
    times_plain: Interval
    same_words: float


def lossless_pairs(
    session: Session, draft_model: DraftModel | None, sampling: Sampling, drafters: Iterable[str] = DRAFTERS
) -> dict[tuple[str, str], SpeculativeDecoder]:
    """All pairs that are exact, plain decoding first; without a draft model only those that need none."""
    found = {}
    for draft in drafters:
        for verify in VERIFIERS:
            try:
                found[draft, verify] = decoder(
                    session, sampling=sampling, draft=draft, verify=verify, draft_model=draft_model
                )
            except InputError:
                continue  # not lossless, or no draft model for this target
    return found


def measure_grid(
    decoders: dict[tuple[str, str], SpeculativeDecoder],
    prompts: Sequence[Sequence[int]],
    stop_ids: Iterable[int] = (),
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[GridRow]:
    """Run all decoders on all prompts, in turns; fastest first.

    Args:
        decoders: of `lossless_pairs`; plain decoding among them.
        prompts: token ids, at least two.
        progress: called with the number of generations that are done.

    Raises:
        InputError: fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InputError(f"prompts: {len(prompts)} are too few for an interval; give at least two")
    stops, done = list(stop_ids), 0

    def run(decode: SpeculativeDecoder, item: tuple[int, Sequence[int]]) -> Generation:
        nonlocal done
        number, prompt = item
        found = decode.generate(prompt, max_new_tokens, stops, seed=number)
        done += 1
        progress(done)
        return found

    names = {f"{draft} {verify}": (draft, verify) for draft, verify in decoders}
    runs = {name: partial(run, decoders[pair]) for name, pair in names.items()}
    timed = paired(runs, list(enumerate(prompts)), warmup=0)
    work = {name: [float(len(g.token_ids)) for g in timed.outputs[name]] for name in runs}
    plain = next(name for name, (draft, _) in names.items() if draft == PLAIN)
    rows = []
    for name, (draft, verify) in names.items():
        made = timed.outputs[name]
        same = [g.token_ids == p.token_ids for g, p in zip(made, timed.outputs[plain], strict=True)]
        rows.append(
            GridRow(
                draft,
                verify,
                sum(work[name]) / sum(timed.median_seconds(name)),
                ratio_of_sums(work[name], [g.target_passes for g in made]),
                sum(step.depth > 0 for g in made for step in g.steps) / max(1.0, sum(work[name])),
                timed.ratio(name, plain, work),
                sum(same) / len(same),
            )
        )
    return sorted(rows, key=lambda row: -row.times_plain.value)
