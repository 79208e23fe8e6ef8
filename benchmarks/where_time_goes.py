"""Where a decoder's time goes: drafting, the target's pass, verification; and what each would have to be.

    python benchmarks/where_time_goes.py [PROMPTS] [TOKENS] [TEMPERATURE]     # 6 prompts, 48 tokens, greedy

For each decoder the milliseconds of a pass of its loop, its parts, and two ceilings against plain decoding: if
drafting and verification took no time, and if besides the target's pass cost what a pass over one token does.
The last is the tokens a pass, which no machine can beat.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenworks.core.data import prompts
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode import SpeculativeDecoder, decoder

DRAFTS = ("token-recycling", "prompt-tokens", "draft-chain", "independent-drafts", "rsd-c", "rsd-s", "dyspec",
          "dyspec-threshold", "dyspec-best")  # fmt: skip


class Watched:
    """Passes calls on, and adds up how long those of some names take."""

    def __init__(self, inner: Any, parts: dict[str, str], seconds: dict[str, float]) -> None:
        self._inner, self._parts, self._seconds = inner, parts, seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._parts:
            return found

        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return found(*args, **options)
            finally:
                self._seconds[self._parts[name]] += time.perf_counter() - begun

        return timed


def main(count: int = 6, new_tokens: int = 48, temperature: float = 0.0) -> None:
    loaded, sampling = load("smollm2-135m"), Sampling(temperature)
    stops = stop_ids(loaded.model, loaded.tokenizer)
    chosen = [encode_prompt(loaded.tokenizer, p.text) for p in prompts(split="calibration", limit=count)]
    table = Table(title=f"smollm2-135m, {count} prompts, {new_tokens} new tokens, temperature {temperature}")
    for heading in ("drafter", "tokens a pass", "ms a pass", "drafting", "target", "verification", "rest",
                    "times plain", "with free drafts", "with free width"):  # fmt: skip
        table.add_column(heading)
    plain = 0.0
    for name in ("plain", *DRAFTS):
        seconds: dict[str, float] = defaultdict(float)
        session = Session(loaded.model)
        made = SpeculativeDecoder(session, sampling=sampling)
        if name != "plain":
            made = decoder(session, sampling=sampling, draft=name)
        made.session = Watched(made.session, {"extend": "target"}, seconds)  # type: ignore[assignment]
        made.drafter = Watched(made.drafter, {"propose": "drafting", "observe": "drafting"}, seconds)  # type: ignore[assignment]
        made.verifier = Watched(made.verifier, {"verify": "verification"}, seconds)  # type: ignore[assignment]
        made.generate(chosen[0], 8, stops)  # warms up
        seconds.clear()
        passes = tokens = 0
        for number, ids in enumerate(chosen):
            ends: list[float] = []
            found = made.generate(ids, new_tokens, stops, number, lambda _, e=ends: e.append(time.perf_counter()))
            seconds["all"] += ends[-1] - ends[0]  # without the pass over the prompt
            passes, tokens = passes + len(found.accepted), tokens + sum(found.accepted)
        each = {part: 1000 * total / passes for part, total in seconds.items()}
        rest = each["all"] - each["target"] - each["drafting"] - each["verification"]
        plain = plain or each["all"]
        confirmed = tokens / passes
        table.add_row(
            name,
            f"{confirmed:.2f}",
            *(f"{each[part]:.1f}" for part in ("all", "drafting", "target", "verification")),
            f"{rest:.1f}",
            f"{confirmed * plain / each['all']:.2f}",
            f"{confirmed * plain / each['target']:.2f}",
            f"{confirmed:.2f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *map(float, sys.argv[3:4]))
