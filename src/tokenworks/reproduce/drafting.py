"""What the reproductions of draft-and-verify papers share: several decoders on the same prompts, counted.

Each decoder runs on each prompt, in an order that turns from prompt to prompt. A seed is the seed of the draws.
Prompts are the independent units of all intervals; the seeds of a prompt are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenworks.core.data import Prompt
from tokenworks.core.measure import Interval, PairedRuns, ratio_of_sums
from tokenworks.core.models import LoadedModel
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.reproduce import Run
from tokenworks.reproduce.ledger import Ledger

Counts = dict[str, float]


class Comparison:
    """What each decoder did on each prompt.

    Attributes:
        counts: for each decoder and prompt, summed over seeds: `tokens` and `passes` of the decoding loop (those
            of the prompt's own pass left out), `nats` (the negative log-likelihood of the text under the target
            at temperature 1), `words` (tokens that is the sum over), `seconds`.
        texts: for each decoder and prompt the ids of the first seed.
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Counts]] = {}
        self.texts: dict[str, dict[str, list[int]]] = {}

    def add(self, name: str, prompt: str, piece: dict[str, Any]) -> None:
        """Count one generation."""
        mine = self.counts.setdefault(name, {}).setdefault(prompt, {})
        for key, number in piece["counts"].items():
            mine[key] = mine.get(key, 0.0) + number
        self.texts.setdefault(name, {}).setdefault(prompt, piece["token_ids"])

    def per_prompt(self, name: str, what: str) -> list[float]:
        return [counts[what] for counts in self.counts[name].values()]

    def efficiency(self, name: str) -> Interval:
        """Block efficiency: tokens for each pass of the target in the decoding loop; plain decoding has 1."""
        return ratio_of_sums(self.per_prompt(name, "tokens"), self.per_prompt(name, "passes"))

    def nats(self, name: str) -> Interval:
        """Negative log-likelihood of a token under the target, at temperature 1."""
        return ratio_of_sums(self.per_prompt(name, "nats"), self.per_prompt(name, "words"))

    def gain(self, name: str, baseline: str) -> Interval:
        """Block efficiency, one by the other."""
        return self._ratio(name, baseline, "tokens", "passes")

    def speed(self, name: str, baseline: str) -> Interval:
        """Tokens a second, one by the other."""
        return self._ratio(name, baseline, "words", "seconds")

    def tokens_per_second(self, name: str) -> float:
        return sum(self.per_prompt(name, "words")) / sum(self.per_prompt(name, "seconds"))

    def likelier(self, name: str, baseline: str) -> Interval:
        """Nats a token of `baseline` by those of `name`: 1 if both write equally likely text."""
        return self._ratio(name, baseline, "words", "nats")

    def same_text(self, name: str, baseline: str) -> float:
        """Share of prompts with the same tokens."""
        same = [ids == self.texts[baseline][prompt] for prompt, ids in self.texts[name].items()]
        return sum(same) / len(same)

    def rows(self, plain: str) -> list[dict[str, Any]]:
        """A table of all decoders."""
        return [
            {
                "decoder": name,
                "tokens a pass": round(self.efficiency(name).value, 3),
                "nats a token": round(self.nats(name).value, 3),
                "tokens/s": round(self.tokens_per_second(name), 1),
                "times plain": round(self.speed(name, plain).value, 2),
            }
            for name in self.counts
        ]

    def _ratio(self, name: str, baseline: str, work: str, cost: str) -> Interval:
        names = (name, baseline)
        costs = {each: [[number] for number in self.per_prompt(each, cost)] for each in names}
        return PairedRuns[None](costs, {}).ratio(
            name, baseline, {each: self.per_prompt(each, work) for each in names}
        )


def compare(
    settings: Run,
    loaded: LoadedModel,
    decoders: Mapping[str, SpeculativeDecoder],
    prompts: Sequence[Prompt],
    new_tokens: int,
    ledger: Ledger,
    stage: str = "",
) -> Comparison:
    """Run every decoder on every prompt with every seed; what the ledger already has is not run again.

    Args:
        stage: begins the ledger's keys, where a reproduction compares more than once.
    """
    found, stops = Comparison(), stop_ids(loaded.model, loaded.tokenizer)
    names, total, done = list(decoders), settings.seeds * len(prompts) * len(decoders), 0
    for seed in range(settings.seeds):
        for turn, prompt in enumerate(prompts):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                settings.progress(done, total, f"{stage} {prompt.id}, {name}".strip())
                work = _generation(loaded, decoders[name], prompt, new_tokens, stops, seed)
                found.add(name, prompt.id, ledger.once(f"{stage}/{seed}/{prompt.id}/{name}", work))
                done += 1
    settings.progress(total, total, stage)
    return found


def _generation(
    loaded: LoadedModel,
    decode: SpeculativeDecoder,
    prompt: Prompt,
    new_tokens: int,
    stops: Sequence[int],
    seed: int,
) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        ids = encode_prompt(loaded.tokenizer, prompt.text)
        made = decode.generate(ids, new_tokens, stops, seed=seed)
        counts = {
            "tokens": sum(made.accepted),
            "passes": len(made.accepted),
            "nats": -sum(math.log(max(step.probability, 1e-30)) for step in made.steps),
            "words": len(made.token_ids),
            "seconds": made.seconds,
        }
        return {"token_ids": made.token_ids, "counts": counts}

    return work
