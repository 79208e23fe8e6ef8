"""TokenPreferenceTrainer: TRL's numbers for DPO, and all that TRL brings along for every other method."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from tests.conftest import tiny_model
from tokenworks.align.contract import PreferenceMethod
from tokenworks.align.dpo import DPO
from tokenworks.align.sparsepo import SparsePO
from tokenworks.align.tdpo import TDPO
from tokenworks.align.tgdpo import TGDPO
from tokenworks.align.trainer import TokenPreferenceConfig, TokenPreferenceTrainer
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError

PLAIN = {
    "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False,
    "logging_steps": 1, "gradient_checkpointing": False, "save_strategy": "no", "learning_rate": 1e-2,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["nothing to merge"], 257, special=["<end>"])
    found.eos_token = "<end>"
    return found


def data(rows: int = 4) -> Dataset:
    texts = [("abc", "def", "ghij"), ("xy", "zzzz", "q"), ("xyz", "zazz", "qr"), ("xyw", "zbzz", "qs")] * 2
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts[:rows]])


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model("llama", 0, vocab_size=257), tiny_model("llama", 1, vocab_size=257)


def trainer(
    tokenizer: PreTrainedTokenizerBase, out: Path, method: PreferenceMethod, **changes: Any
) -> TokenPreferenceTrainer:
    policy, reference = models()
    special = {name: changes.pop(name) for name in ("peft_config", "scorer") if name in changes}
    if "peft_config" in special:
        reference = None  # type: ignore[assignment]  # the policy without its adapter
    return TokenPreferenceTrainer(
        changes.pop("model", policy), changes.pop("ref_model", reference), method=method,
        train_dataset=changes.pop("train_dataset", data()), processing_class=tokenizer,
        args=TokenPreferenceConfig(str(out), **(PLAIN | changes)), **special,
    )  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def losses(found: Any) -> list[float]:
    return [row["loss"] for row in found.state.log_history if "loss" in row]


def test_our_dpo_is_trls(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Loss and gradient of one batch, and the weights after two steps."""
    ours = trainer(tokenizer, tmp_path, DPO(0.1))
    policy, reference = models()
    theirs = DPOTrainer(
        policy, reference, args=DPOConfig(str(tmp_path), **PLAIN), train_dataset=data(),  # type: ignore[arg-type]
        processing_class=tokenizer,
    )  # fmt: skip
    gradients = []
    for found in (ours, theirs):
        batch = next(iter(found.get_train_dataloader()))
        loss = found.compute_loss(found.model, batch)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in found.model.parameters())])  # type: ignore[union-attr]
        found.model.zero_grad()  # type: ignore[union-attr]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    for found in (ours, theirs):
        found.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    names = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "entropy",
        "num_tokens",
    }
    assert names <= set(ours.state.log_history[0]) & set(theirs.state.log_history[0])
    for name in names:
        assert ours.state.log_history[0][name] == pytest.approx(theirs.state.log_history[0][name], abs=1e-4)


def test_lora_trains_its_adapter_against_the_base(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    before, _ = models()
    found = trainer(
        tokenizer, tmp_path, TDPO(0.1), peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    found.train()
    assert losses(found)[0] == pytest.approx(0.6931, abs=1e-4)  # the adapter begins as nothing
    assert losses(found)[1] != pytest.approx(0.6931, abs=1e-4)
    base = found.model.get_base_model().state_dict()  # type: ignore[union-attr, operator]
    for name, value in before.state_dict().items():
        kept = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        torch.testing.assert_close(kept, value)


def test_accumulation_is_a_larger_batch(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (1, 4)):
        run = trainer(
            tokenizer, tmp_path, TDPO(0.1), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=1, optim="sgd",
        )  # fmt: skip
        run.train()
        found.append(weights(run.model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("learned", [False, True], ids=["tdpo", "sparsepo"])
def test_a_run_that_was_cut_off_goes_on(learned: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def method() -> PreferenceMethod:
        torch.manual_seed(0)
        return SparsePO("independent", 3, 32, beta=0.5, init="ones", dropout=0.0) if learned else TDPO(0.1)

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    whole = trainer(tokenizer, tmp_path / "whole", method(), **settings)
    whole.train()
    again = trainer(tokenizer, tmp_path / "again", method(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(again.model)[name], value, atol=1e-6, rtol=1e-5)


def test_a_learned_mask_is_trained_and_kept_beside_the_model(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    method = SparsePO("common", 3, 32, beta=0.5, init="ones", dropout=0.0)
    before = copy.deepcopy(method.state_dict())
    found = trainer(tokenizer, tmp_path, method)
    found.train()
    assert any(not torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert "sparsity/reward" in found.state.log_history[0]
    found.save_model(str(tmp_path / "kept"))
    assert not any("token_method" in name for name in load_file(tmp_path / "kept" / "model.safetensors"))
    masks = load_file(tmp_path / "kept" / "token_method.safetensors")
    torch.testing.assert_close(masks["mask_u.mixer"], method.mask_u.mixer.detach())  # type: ignore[union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    torch.testing.assert_close(loaded.lm_head.weight, found.model.lm_head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("mixer", ["learned", "mean"])
def test_masks_can_have_settings_of_their_own(
    mixer: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With a rate of 0 they stay; decay alone shrinks them by rate x decay a step; a fixed mixer stays anyway.
    What is not set is the model's: its decay, which spares norms."""
    found = {}
    cases: dict[str, dict[str, Any]] = {
        "still": {"method_learning_rate": 0.0},
        "decayed": {"method_weight_decay": 0.5, "learning_rate": 0.1},
        "inherited": {"method_learning_rate": 0.1, "weight_decay": 0.5},
        "alike": {},
    }
    for name, changes in cases.items():
        method = SparsePO("common", 3, 32, beta=1e-9, init="ones", dropout=0.0, mixer=mixer)
        started = copy.deepcopy(method.state_dict())
        settings = {"optim": "sgd", "lr_scheduler_type": "constant"} | changes
        found[name] = trainer(tokenizer, tmp_path / name, method, **settings)
        found[name].train()
        after = method.state_dict()
        shrunk = {"mask_u.mixer": ("decayed", "inherited"), "mask_u.norm.weight": ("decayed",)}
        for key, where in shrunk.items():
            fixed = key == "mask_u.mixer" and mixer == "mean"
            left = (1 - 0.1 * 0.5) ** 2 if name in where and not fixed else 1.0
            torch.testing.assert_close(after[key], left * started[key], atol=1e-5, rtol=0)
    groups = {name: len(each.optimizer.param_groups) for name, each in found.items()}  # type: ignore[union-attr]
    assert groups["still"] > groups["alike"]
    sizes = {
        name: sum(p.numel() for group in each.optimizer.param_groups for p in group["params"])  # type: ignore[union-attr]
        for name, each in found.items()
    }
    assert len(set(sizes.values())) == 1


def test_scores_reach_the_method(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """From a scorer and from columns alike; the end of the text has one too."""

    def scorer(prompt: list[int], response: list[int]) -> list[float]:
        return [0.1 * len(prompt) + place for place in range(len(response))]

    found = trainer(tokenizer, tmp_path, TGDPO(alpha=0.01), scorer=scorer)
    batch = next(iter(found.get_train_dataloader()))
    inside = batch["completion_mask"].bool()
    for row in range(len(inside)):
        length = int((batch["attention_mask"][row] - batch["completion_mask"][row]).sum())
        expected = [0.1 * length + place for place in range(int(inside[row].sum()))]
        assert batch["scores"][row][inside[row]].tolist() == pytest.approx(expected)
    found.train()
    columns = found.train_dataset
    again = trainer(tokenizer, tmp_path, TGDPO(alpha=0.01), train_dataset=columns)
    again.train()
    assert losses(again) == pytest.approx(losses(found), abs=1e-6)
    plain = trainer(tokenizer, tmp_path, TGDPO(alpha=0.0), scorer=scorer)
    plain.train()
    assert losses(plain) != pytest.approx(losses(found), abs=1e-6)


def test_evaluation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy, reference = models()
    found = TokenPreferenceTrainer(
        policy, reference, method=TDPO(0.1), train_dataset=data(), eval_dataset=data(2),
        processing_class=tokenizer, args=TokenPreferenceConfig(str(tmp_path), **PLAIN),  # type: ignore[arg-type]
    )  # fmt: skip
    numbers = found.evaluate()
    assert numbers["eval_loss"] > 0
    assert numbers["eval_divergence"] > 0
    assert 0 <= numbers["eval_rewards/accuracies"] <= 1


def in_processes(number: int, script: str, *arguments: object) -> None:
    """Run a script beside this file under torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}",
        str(Path(__file__).with_name(script)), *map(str, arguments),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Data parallel on two CPU processes, against one with twice the batch."""
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        in_processes(processes, "two_processes.py", tmp_path / str(processes), out, 4 // processes)
        results.append(json.loads(out.read_text()))
    one, two = results
    assert two["processes"] == 2
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["margins"] == pytest.approx(one["margins"], abs=1e-4)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)


def test_sharded_models_are_read_like_whole_ones(tmp_path: Path) -> None:
    """FSDP on two CPU processes: heads tied or not, weights kept or given back after it."""
    in_processes(2, "sharded.py", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4
    for case in found:
        assert case["sharded"] == pytest.approx(case["whole"], abs=1e-6)
        assert case["gap"] < 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0.5}, "beta: an option of TRL's DPO loss"),
        ({"loss_type": "ipo"}, "loss_type: an option of TRL's DPO loss"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: an option"),
        ({"max_length": 4}, "max_length: 4 cuts off"),
        ({"ref_model": tiny_model("llama", vocab_size=300)}, "ref_model: it knows 300 tokens and the policy 257"),
        ({"train_dataset": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "b"}])},
         "both responses of pair 0 are the same"),
    ],
)  # fmt: skip
def test_misuse(changes: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        trainer(tokenizer, tmp_path, DPO(), **changes)


def test_a_head_that_no_process_holds_is_refused(tmp_path: Path) -> None:
    args: Any = TokenPreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(InputError, match="deepspeed: ZeRO stage 3 keeps no whole head"):
        TokenPreferenceTrainer(models()[0], method=DPO(0.1), args=args, train_dataset=data())


def test_scores_that_do_not_fit(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scorer: the method needs token rewards of a guide"):
        trainer(tokenizer, tmp_path, TGDPO())
    with pytest.raises(InputError, match="chosen_scores: pair 0 has 1 numbers for 4 tokens"):
        trainer(tokenizer, tmp_path, TGDPO(), scorer=lambda prompt, response: [1.0])
