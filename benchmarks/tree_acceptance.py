"""Measure how often each node of Token Recycling's published tree is accepted, on the calibration prompts.

    python benchmarks/tree_acceptance.py     # writes src/tokenworks/decode/token_recycling.json, in minutes

Text and matrix are deterministic, so the figures depend on the model alone, not on the machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenworks.core.data import prompts
from tokenworks.core.files import atomic_write
from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.decode.token_recycling import measure_acceptance

TARGET = Path(__file__).parents[1] / "src/tokenworks/decode/token_recycling.json"


def main() -> None:
    loaded = load("smollm2-135m")
    ids = [encode_prompt(loaded.tokenizer, prompt.text) for prompt in prompts(split="calibration")]
    rates = measure_acceptance(Session(loaded.model), ids, 128, stop_ids(loaded.model, loaded.tokenizer))
    with atomic_write(TARGET) as out:
        lines = ",\n".join(json.dumps([list(path), round(rate, 4)]) for path, rate in rates.items())
        out.write(f"[\n{lines}\n]\n")
    print(f"1 + {sum(rates.values()):.2f} tokens a pass; written to {TARGET}")


if __name__ == "__main__":
    main()
