"""Measure what a pass of Token Recycling confirms with trees of several sizes, on the calibration prompts.

    python benchmarks/tree_yields.py     # writes src/tokenworks/decode/token_recycling.json, in ten minutes

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
from tokenworks.decode.token_recycling import measure_yields

TARGET = Path(__file__).parents[1] / "src/tokenworks/decode/token_recycling.json"


def main() -> None:
    loaded = load("smollm2-135m")
    ids = [encode_prompt(loaded.tokenizer, prompt.text) for prompt in prompts(split="calibration")]
    found = measure_yields(Session(loaded.model), ids, stop_ids=stop_ids(loaded.model, loaded.tokenizer))
    with atomic_write(TARGET) as out:
        nodes = max((tree for tree, _ in found), key=len)
        out.write('{"yields": ' + json.dumps([[len(tree), round(tokens, 4)] for tree, tokens in found]) + ",\n")
        out.write('"nodes": ' + json.dumps(nodes) + "}\n")
    for tree, tokens in found:
        print(f"{len(tree):3} nodes: {tokens:.3f} tokens a pass")


if __name__ == "__main__":
    main()
