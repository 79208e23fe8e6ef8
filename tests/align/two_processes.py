"""Run by test_trainer under torchrun: two steps of TDPO, and what they came to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.align.test_trainer import PLAIN, data, losses, models
from tokenworks.align.tdpo import TDPO
from tokenworks.align.trainer import TokenPreferenceConfig, TokenPreferenceTrainer
from tokenworks.core.corpus import train_bpe

if __name__ == "__main__":
    folder, out, size = sys.argv[1:]
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    policy, reference = models()
    trainer = TokenPreferenceTrainer(
        policy, reference, method=TDPO(0.1), train_dataset=data(8), processing_class=tokenizer,
        args=TokenPreferenceConfig(folder, **(PLAIN | {"per_device_train_batch_size": int(size)})),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    if int(os.environ["RANK"]) == 0:
        found = {
            "processes": trainer.accelerator.num_processes,
            "losses": losses(trainer),
            "margins": [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row],
            "norm": float(sum(p.detach().double().norm() for p in policy.parameters())),
        }
        Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
