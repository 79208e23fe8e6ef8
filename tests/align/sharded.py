"""Run by test_trainer under torchrun: TDPO's loss and gradients with both models sharded by FSDP, and without."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.conftest import tiny_model
from tokenworks.align.reading import EncodedPair, collate, let_read, read_pairs
from tokenworks.align.tdpo import TDPO

PAIRS = [EncodedPair([1, 2], [3, 4, 5], [6, 7]), EncodedPair([8], [9, 10], [11, 12, 13])]


def loss_of(policy: Any, reference: Any, pairs: list[EncodedPair]) -> Tensor:
    method = TDPO(0.1, variant="tdpo1")
    loss = method(read_pairs(policy, reference, collate(pairs), method.needs)).loss.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def sharded(model: Any, reshard: bool) -> Any:
    let_read(model)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found: list[dict[str, float]] = []
    for tied in (False, True):
        policy, reference = (tiny_model("llama", seed, tie_word_embeddings=tied) for seed in (0, 1))
        whole = loss_of(policy, reference, PAIRS)
        for reshard in (False, True):
            ours, other = (
                sharded(tiny_model("llama", seed, tie_word_embeddings=tied), reshard) for seed in (0, 1)
            )
            loss = loss_of(ours, other, PAIRS[dist.get_rank() :][:1])
            dist.all_reduce(loss)
            gaps = [
                float((one.grad - two.grad.full_tensor()).abs().max())
                for one, two in zip(policy.parameters(), ours.parameters(), strict=True)
            ]
            found.append({"whole": float(whole), "sharded": float(loss) / 2, "gap": max(gaps)})
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # now and then a thread of the group aborts a process that ends in the usual way
