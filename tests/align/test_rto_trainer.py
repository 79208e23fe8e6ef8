"""RTOTrainer: PPO with token rewards on TRL's GRPOTrainer, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import LLAMA_LIKE, tiny_model
from tokenworks.align.rto import dense_rewards, gae, policy_loss, value_loss, whiten
from tokenworks.align.rto_trainer import RTOConfig, RTOTrainer
from tokenworks.align.scores import guide_rewards, token_log_probs
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError

PLAIN = {
    "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False,
    "logging_steps": 1, "gradient_checkpointing": False, "save_strategy": "no", "learning_rate": 1e-2,
    "disable_tqdm": True, "max_completion_length": 5, "critic_learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["nothing to merge"], 257, special=["<end>"])
    found.eos_token = "<end>"
    return found


def model(seed: int) -> PreTrainedModel:
    return tiny_model("llama", seed, vocab_size=257)


def judge(completions: list[str], **others: Any) -> list[float]:
    return [len(text) / 5 + (ord(text[0]) % 7 if text else 0) for text in completions]


def trainer(tokenizer: PreTrainedTokenizerBase, out: Path, **changes: Any) -> RTOTrainer:
    names = ("dpo_model", "ref_model", "critic", "token_reward", "peft_config", "train_dataset", "tools")
    options = {
        "dpo_model": model(1),
        "train_dataset": Dataset.from_list([{"prompt": p} for p in ("abc", "xy") * 4]),
    }
    options |= {name: changes.pop(name) for name in names if name in changes}
    return RTOTrainer(
        changes.pop("model", None) or model(0), changes.pop("reward_funcs", judge), processing_class=tokenizer,
        args=RTOConfig(str(out), **(PLAIN | changes)), **options,
    )  # fmt: skip


def weights(found: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in found.state_dict().items()}


def rollout(found: RTOTrainer, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    found.model.train()
    return found._generate_and_score_completions([{"prompt": p} for p in ("abc", "xy", "q", "abcdef")])


def by_hand(inputs: dict[str, Tensor], seeds: tuple[int, ...], temperature: float) -> list[Tensor]:
    """Log-probabilities of the responses under models by their seeds, one unpadded text at a time."""
    found = []
    for seed in seeds:
        rows = torch.zeros(inputs["completion_mask"].shape)
        for place in range(len(rows)):
            begin = inputs["prompt_ids"][place][inputs["prompt_mask"][place].bool()]
            response = inputs["completion_ids"][place][inputs["completion_mask"][place].bool()]
            with torch.no_grad():
                logits = model(seed)(torch.cat([begin, response])[None]).logits[0, len(begin) - 1 : -1]
            log = (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]
            rows[place, : len(response)] = log
        found.append(rows)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dpo_clip", [None, 0.05])
def test_the_rollout(
    temperature: float, dpo_clip: float | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Log-probabilities at the temperature of sampling, and from them rewards, values and advantages."""
    found = trainer(
        tokenizer, tmp_path, temperature=temperature, dpo_clip=dpo_clip, reward_mean=2.0, reward_std=4.0,
        ref_model=model(2), beta2=0.1,
    )  # fmt: skip
    with torch.no_grad():
        found.critic.layers[-1].weight.normal_()
    inputs = rollout(found)
    mask = inputs["completion_mask"].bool()
    old, dpo, ref = by_hand(inputs, (0, 1, 2), temperature)
    torch.testing.assert_close(inputs["old_per_token_logps"][mask], old[mask], atol=1e-4, rtol=1e-4)
    texts = [tokenizer.decode(row[m], skip_special_tokens=True) for row, m in
             zip(inputs["completion_ids"], mask, strict=True)]  # fmt: skip
    sentence = (torch.tensor(judge(texts)) - 2) / 4
    rewards = dense_rewards(dpo, ref, old, mask, sentence, 0.05, 0.1, 1.0, dpo_clip)
    advantages, returns = gae(rewards, inputs["old_values"], mask)
    torch.testing.assert_close(inputs["returns"], returns, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(inputs["advantages"], whiten(advantages, mask), atol=1e-3, rtol=1e-3)
    assert inputs["old_values"].abs().max() > 0.1


def test_the_loss_is_ppos(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """TRL's loss and the critic's are the functions of `align.rto`, also once the policy has moved."""
    found = trainer(tokenizer, tmp_path)
    inputs = rollout(found)
    mask = inputs["completion_mask"].bool()
    found.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        for parameter in [*found.model.parameters(), *found.critic.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    log_p, _, _ = found._get_per_token_logps_and_entropies(found.model, ids, attention, mask.shape[1])
    assert ((log_p - inputs["old_per_token_logps"]).exp()[mask] - 1).abs().max() > 0.2  # some are clipped
    expected = policy_loss(log_p, inputs["old_per_token_logps"], inputs["advantages"], mask)
    values = torch.where(mask, found.critic(inputs["critic_states"]), 0.0)
    expected = expected + value_loss(values, inputs["old_values"], inputs["returns"], mask)
    torch.testing.assert_close(found._compute_loss(found.model, inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training(lora: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Policy and critic learn; nothing reaches the DPO model or the reference."""
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    found = trainer(tokenizer, tmp_path, steps_per_generation=2, **options)
    assert (found.reference is None) == lora
    parts = [found.model, found.critic, found.dpo_model, *([] if lora else [found.reference])]
    before = [weights(part) for part in parts]
    found.train()
    moved = [
        {n for n, value in weights(part).items() if not torch.equal(one[n], value)}
        for part, one in zip(parts, before, strict=True)
    ]
    assert moved[0]
    assert all("lora" in name for name in moved[0]) == lora
    assert moved[1]
    assert not any(moved[2:])
    assert all(p.grad is None for part in parts[2:] for p in part.parameters())
    log = [row for row in found.state.log_history if "loss" in row]
    assert len(log) == 2
    for name in ("reward", "rto/kl", "rto/token_reward", "rto/sentence_reward", "rto/value_loss", "rto/return"):
        assert name in log[0]
    assert log[0]["rto/kl"] == pytest.approx(0, abs=1e-4)  # nothing has moved yet
    assert abs(log[0]["rto/token_reward"]) > 1e-4


def test_lora_reads_its_base_as_reference(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = trainer(tokenizer, tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    inputs = rollout(found)
    mask = inputs["completion_mask"].bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        log_ref, _ = found._read_reference(ids, attention, mask)
    torch.testing.assert_close(log_ref, by_hand(inputs, (0,), 1.0)[0], atol=1e-4, rtol=1e-4)
    assert (inputs["old_per_token_logps"] - log_ref)[mask].abs().max() > 0.1


def test_ppo_is_beta1_0_or_a_dpo_model_that_is_the_reference(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    runs = []
    for options in ({"beta1": 0.0, "dpo_model": None}, {"beta1": 0.5, "dpo_model": model(0)}, {"beta1": 0.5}):
        found = trainer(tokenizer, tmp_path, dpo_clip=None, **options)
        found.train()
        runs.append(weights(found.model))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(runs[0][name], runs[2][name], atol=1e-4) for name in runs[0])


def test_any_scorer_gives_token_rewards(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """At temperature 1 the guide's log-ratio is that of the DPO model."""
    runs = []
    for options in ({}, {"dpo_model": None, "token_reward": guide_rewards(model(1), model(0), beta=1.0)}):
        runs.append(rollout(trainer(tokenizer, tmp_path, **options)))
    torch.testing.assert_close(runs[0]["returns"], runs[1]["returns"], atol=1e-4, rtol=1e-3)


def test_a_user_s_critic(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A module on states, and a token classifier that reads the texts itself."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(32, 1)

        def forward(self, states: Tensor) -> Tensor:
            return self.last(states)[..., 0]

    classifier = reward_model()
    for critic in (Linear(), classifier):
        found = trainer(tokenizer, tmp_path, critic=critic)
        before = weights(critic)
        inputs = rollout(found)
        mask = inputs["completion_mask"].bool()
        assert (inputs["old_values"][~mask] == 0).all()
        if critic is classifier:
            begin = inputs["prompt_ids"][1][inputs["prompt_mask"][1].bool()]
            response = inputs["completion_ids"][1][mask[1]]
            with torch.no_grad():
                alone = critic(torch.cat([begin, response])[None]).logits[0, len(begin) - 1 : -1, 0]
            torch.testing.assert_close(inputs["old_values"][1][mask[1]], alone, atol=1e-5, rtol=1e-4)
        found.train()
        assert any(not torch.equal(before[name], value) for name, value in weights(critic).items())


def reward_model(**changes: Any) -> PreTrainedModel:
    config = tiny_model("llama", vocab_size=257).config
    for name, value in ({"num_labels": 1, "classifier_dropout": 0.0} | changes).items():
        setattr(config, name, value)
    return AutoModelForTokenClassification.from_config(config).eval()  # type: ignore[no-any-return]


def test_a_run_that_was_cut_off_keeps_its_critic(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    found = trainer(tokenizer, tmp_path, **settings)
    found.train()
    kept = load_file(tmp_path / "checkpoint-2" / "critic.safetensors")
    for name, value in found.critic.state_dict().items():
        torch.testing.assert_close(kept[name], value)
    again = trainer(tokenizer, tmp_path, max_steps=3, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = again.critic_optimizer.state_dict()["state"]
    assert {int(each["step"]) for each in state.values()} == {3}


def test_accumulation_is_a_larger_batch(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (2, 2)):
        run = trainer(
            tokenizer, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            optim="sgd", max_grad_norm=0.0, shuffle_dataset=False, critic_learning_rate=1e-3,
        )  # fmt: skip
        run.train()
        found.append((weights(run.model), weights(run.critic)))
    for one, two in zip(*found, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def test_scores_and_log_probabilities_agree(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The trainer reads a response as `align.scores` does."""
    inputs = rollout(trainer(tokenizer, tmp_path))
    prompt = inputs["prompt_ids"][0][inputs["prompt_mask"][0].bool()].tolist()
    response = inputs["completion_ids"][0][inputs["completion_mask"][0].bool()].tolist()
    alone = token_log_probs(model(0), prompt, response)
    torch.testing.assert_close(inputs["old_per_token_logps"][0][: len(response)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dpo_model": None}, "dpo_model: give it or token_reward"),
        ({"token_reward": lambda prompt, response: [0.0]}, "dpo_model: give it or token_reward, and not both"),
        ({"dpo_model": tiny_model("llama", vocab_size=300)}, "dpo_model: it knows 300 tokens and the policy 257"),
        ({"ref_model": tiny_model("llama", vocab_size=300)}, "ref_model: it knows 300 tokens"),
        ({"model": "a/name"}, "model: str is not a loaded model"),
        ({"dpo_clip": -0.1}, "dpo_clip: -0.1"),
        ({"beta2": -0.1}, "beta2: -0.1"),
        ({"epsilon": -0.1}, "epsilon: -0.1"),
        ({"reward_std": 0.0}, "reward_std: 0.0"),
        ({"gae_lambda": 1.5}, "gae_lambda: 1.5"),
        ({"beta": 0.1}, "beta: 0.1; RTO has a loss of its own"),
        ({"loss_type": "dapo"}, "loss_type: 'dapo'"),
        ({"tools": [judge]}, "tools: advantages over tokens that others wrote"),
        ({"critic": nn.Sequential(nn.Linear(32, 1), nn.Dropout(0.1))}, "critic: it has dropout"),
        ({"critic": nn.Linear(32, 1)}, r"critic: of states \[2, 3, 32\] it makes \[2, 3, 1\]"),
        ({"critic": nn.Linear(9, 1)}, r"critic: it does not take states \[B, T, 32\]"),
        ({"critic": tiny_model("llama", vocab_size=257)}, "critic: LlamaForCausalLM is no token classifier"),
    ],
)
def test_misuse(changes: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        trainer(tokenizer, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_funcs": lambda completions, **_: [0.0]}, r"rewards: shape \[1\] for 4 texts"),
        ({"reward_funcs": lambda completions, **_: [[0.0, 1.0]] * 4}, r"rewards: shape \[4, 2\] for 4 texts"),
        ({"reward_funcs": lambda completions, **_: [0.0, float("nan"), 0.0, 0.0]}, "that of text 1 is nan"),
        ({"reward_funcs": lambda completions, **_: [0.0, None, 0.0, 0.0]}, "it has no reward for some text"),
        ({"token_reward": lambda prompt, response: [0.0], "dpo_model": None}, "token_reward: it gave numbers of"),
        ({"max_completion_length": LLAMA_LIKE["max_position_embeddings"]}, "train_dataset: a prompt of 6 tokens"),
    ],
)
def test_what_shows_only_in_training(
    changes: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        rollout(trainer(tokenizer, tmp_path, **changes))
