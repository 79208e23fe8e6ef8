"""One optimiser step of every preference method beside TRL's DPO: seconds and peak memory.

    python benchmarks/align.py [PAIRS] [TOKENS] [ROUNDS]

SmolLM2-135M in float32, full fine-tuning with AdamW; PAIRS pairs (4) of TOKENS tokens (128), half of them prompt.
Every method runs in a process of its own, so that the peak is its own, in turns over ROUNDS rounds (2). A step is
timed after one that is not. Scores are given, as they are computed once for all epochs. AlignDistil reads as many
texts, of which it is given the responses; RTO writes its own, as long ones, and the time for that is in its step.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

METHODS = ("TRL's DPO", "dpo", "tgdpo", "cdpo", "tdpo", "sparsepo", "aligndistil", "rto")
STEPS = 3


def child(name: str, pairs: int, tokens: int) -> None:
    """Train for a few steps, and say how long each took and how much memory there was at the peak."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from tokenworks.align import CDPO, DPO, TDPO, TGDPO, SparsePO, TokenPreferenceConfig, TokenPreferenceTrainer
    from tokenworks.align.aligndistil_trainer import AlignDistilConfig, AlignDistilTrainer
    from tokenworks.align.rto_trainer import RTOConfig, RTOTrainer
    from tokenworks.core.models import load

    loaded, reference = load("smollm2-135m"), load("smollm2-135m").model
    generator = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        return torch.randint(1000, 40_000, (tokens // 2,), generator=generator).tolist()

    rows = [
        {"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(),
         "chosen_scores": [0.1] * (tokens // 2), "rejected_scores": [0.1] * (tokens // 2)}
        for _ in range(pairs * STEPS)
    ]  # fmt: skip
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.begun)

    settings = {
        "output_dir": "/tmp/unused", "per_device_train_batch_size": pairs, "max_steps": STEPS, "report_to": [],
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    common: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows), "processing_class": loaded.tokenizer, "callbacks": [Clock()],
    }  # fmt: skip
    # The rows are tokenized already: both trainers take them as they are.
    DPOTrainer._prepare_dataset = lambda self, data, *_: data
    trainer: Any
    if name in ("aligndistil", "rto"):
        # A token a word, and the end.
        half = tokens // 2
        texts = [{"prompt": " the" * half, "chosen": " the" * (half - 1)}] * (2 * pairs * STEPS)
        common["train_dataset"] = Dataset.from_list(texts)
        settings |= {"per_device_train_batch_size": 2 * pairs, "max_completion_length": half}
        other = load("smollm2-135m").model
        if name == "rto":
            trainer = RTOTrainer(
                loaded.model, lambda completions, **_: [float(len(c)) for c in completions], dpo_model=other,
                ref_model=reference, args=RTOConfig(**settings, steps_per_generation=1), **common,
            )  # fmt: skip
        else:
            trainer = AlignDistilTrainer(
                loaded.model, reference, reverse_model=other,
                args=AlignDistilConfig(**settings, on_policy=False), **common,
            )  # fmt: skip
    elif name == METHODS[0]:
        trainer = DPOTrainer(loaded.model, reference, args=DPOConfig(**settings), **common)
    else:
        shape = loaded.model.config
        method = {
            "dpo": DPO, "tgdpo": TGDPO, "cdpo": CDPO, "tdpo": TDPO,
            "sparsepo": lambda: SparsePO("independent", shape.num_hidden_layers, shape.hidden_size, init="ones"),
        }[name]()  # fmt: skip
        trainer = TokenPreferenceTrainer(
            loaded.model, reference, method=method, args=TokenPreferenceConfig(**settings), **common
        )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds[1:], "peak": peak}))


def main() -> None:
    given = [int(text) for text in sys.argv[1:4]]
    pairs, tokens, rounds = given + [4, 128, 2][len(given) :]
    found: dict[str, list[dict[str, object]]] = {name: [] for name in METHODS}
    for turn in range(rounds):
        for name in METHODS if turn % 2 == 0 else METHODS[::-1]:
            command = [sys.executable, __file__, "--child", name, str(pairs), str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"round {turn + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    base = {key: np.median([np.median(run[key]) for run in found[METHODS[0]]]) for key in ("seconds", "peak")}
    print(f"{pairs} pairs of {tokens} tokens, {rounds} rounds\n")
    print(
        "| method | seconds a step | times TRL's DPO | peak memory, MB | times TRL's DPO |\n|---|---|---|---|---|"
    )
    for name, runs in found.items():
        seconds, peak = (np.median([np.median(run[key]) for run in runs]) for key in ("seconds", "peak"))
        ratios = seconds / base["seconds"], peak / base["peak"]
        print(f"| {name} | {seconds:.2f} | {ratios[0]:.2f} | {peak:.0f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
