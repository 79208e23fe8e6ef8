"""Implicit token rewards: the right numbers at the right tokens, TRL's sums, and the mean under the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from tests.align.test_trainer import PLAIN, data, models
from tests.conftest import tiny_model
from tokenworks.align.r_to_q import IGNORED, ImplicitTokenReward
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError

TEXTS = [([1, 2, 3], [4, 5, 6]), ([9, 2], [10, 11, 12, 13, 14]), ([7, 7, 7, 7], [15])]
BETA = 0.3


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["nothing to merge"], 257, special=["<end>"])
    found.eos_token = "<end>"
    return found


def batch(left: bool = False, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels of all texts, padded on one side."""
    width = max(len(p) + len(r) for p, r in TEXTS) + extra
    ids = torch.full((len(TEXTS), width), 5)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, response) in enumerate(TEXTS):
        size = len(prompt) + len(response)
        start = width - size if left else 0
        ids[row, start : start + size] = torch.tensor(prompt + response)
        mask[row, start : start + size] = 1
        labels[row, start + len(prompt) : start + size] = torch.tensor(response)
    return ids, mask, labels


def test_rewards_stand_at_their_tokens(tiny_llama: PreTrainedModel, reference: PreTrainedModel) -> None:
    found = ImplicitTokenReward(tiny_llama, reference, BETA).token_rewards(*batch())
    for row, (prompt, response) in enumerate(TEXTS):
        ids = torch.tensor([prompt + response])
        places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        log_p, log_ref = (m(ids).logits[0].log_softmax(-1)[places, response] for m in (tiny_llama, reference))
        torch.testing.assert_close(found[row, places], BETA * (log_p - log_ref), atol=1e-5, rtol=1e-4)
        outside = torch.ones(found.shape[1], dtype=torch.bool)
        outside[places] = False
        assert not found[row, outside].any()


def test_padding_and_cache_change_nothing(tiny_llama: PreTrainedModel, reference: PreTrainedModel) -> None:
    reader = ImplicitTokenReward(tiny_llama, reference, BETA)
    plain = reader.token_rewards(*batch())
    longer, left = reader.token_rewards(*batch(extra=4)), reader.token_rewards(*batch(left=True, extra=2))
    torch.testing.assert_close(longer[:, : plain.shape[1]], plain, atol=1e-5, rtol=1e-4)
    for row in range(len(TEXTS)):
        torch.testing.assert_close(left[row][left[row] != 0], plain[row][plain[row] != 0], atol=1e-5, rtol=1e-4)
    prompt, response = TEXTS[1]
    whole = []
    for model in (tiny_llama, reference):
        cache, rows = None, []
        for token in prompt + response:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].log_softmax(-1))
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        whole.append(torch.stack([rows[p][t] for p, t in zip(places, response, strict=True)]))
    torch.testing.assert_close(plain[1][plain[1] != 0], BETA * (whole[0] - whole[1]), atol=1e-5, rtol=1e-4)


def test_the_sums_are_trls(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy, reference = models()
    settings: dict[str, Any] = PLAIN | {"max_steps": 1, "learning_rate": 0.0}
    trainer = DPOTrainer(
        policy, reference, args=DPOConfig(str(tmp_path), beta=BETA, per_device_train_batch_size=4,
        **{k: v for k, v in settings.items() if k != "per_device_train_batch_size"}), train_dataset=data(),
        processing_class=tokenizer,
    )  # fmt: skip
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    ids, mask = rows["input_ids"], rows["attention_mask"]
    labels = torch.where(rows["completion_mask"].bool(), ids, IGNORED)
    found = ImplicitTokenReward(policy, reference, BETA).sequence_reward(ids, mask, labels)
    logged = trainer.state.log_history[0]
    chosen, rejected = found.chunk(2)
    assert float(chosen.mean()) == pytest.approx(logged["rewards/chosen"], abs=1e-4)
    assert float(rejected.mean()) == pytest.approx(logged["rewards/rejected"], abs=1e-4)
    assert abs(logged["rewards/chosen"]) > 0.01


def test_the_reference_expects_a_divergence_and_never_a_gain(
    tiny_llama: PreTrainedModel, reference: PreTrainedModel
) -> None:
    reader = ImplicitTokenReward(tiny_llama, reference, BETA)
    ids, mask, _ = batch()
    expected = reader.expected_reference_reward(ids, mask)
    advantages = reader.advantages(ids, mask)
    log_ref = reference(ids, attention_mask=mask).logits.float().log_softmax(-1)
    log_p = tiny_llama(ids, attention_mask=mask).logits.float().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(log_p, log_ref, reduction="none", log_target=True).sum(-1)
    inside = mask.bool()
    torch.testing.assert_close(expected[inside], -BETA * divergence[inside], atol=1e-5, rtol=1e-4)
    mean = (log_ref.exp() * advantages).sum(-1)
    torch.testing.assert_close(expected[inside], mean[inside], atol=1e-5, rtol=1e-4)
    assert (expected[inside] < 0).all()
    q = reader.q_values(ids, mask)
    torch.testing.assert_close(q[inside], BETA * log_p[inside], atol=1e-5, rtol=1e-4)
    # Q - V and the reference's part make up the policy again: the logits of an optimum are its Q.
    torch.testing.assert_close(torch.softmax(q / BETA, -1)[inside], log_p.exp()[inside], atol=1e-5, rtol=1e-4)
    rewards = reader.token_rewards(*batch())
    for row, (prompt, response) in enumerate(TEXTS):
        for place, token in enumerate(response, start=len(prompt) - 1):
            assert float(advantages[row, place, token]) == pytest.approx(float(rewards[row, place]), abs=1e-5)


def test_a_policy_that_is_its_reference_has_no_rewards(tiny_llama: PreTrainedModel) -> None:
    reader = ImplicitTokenReward(tiny_llama, tiny_llama, BETA)
    assert not reader.token_rewards(*batch()).any()
    assert reader.expected_reference_reward(batch()[0]).abs().max() < 1e-6


def test_a_report_points_to_the_lowest_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    policy, reference = models()
    reader = ImplicitTokenReward(policy, reference, BETA)
    trace = reader.report(tokenizer, "ab", "the response")
    ids = tokenizer("ab")["input_ids"] + tokenizer("the response")["input_ids"]
    whole = torch.tensor([ids])
    labels = whole.clone()
    labels[:, :2] = IGNORED
    rewards = reader.token_rewards(whole, torch.ones_like(whole), labels)[0, 1:]
    torch.testing.assert_close(torch.tensor(trace.channels["reward"].values), rewards, atol=1e-5, rtol=1e-4)
    z = torch.tensor(trace.channels["z"].values)
    torch.testing.assert_close(z, (rewards - rewards.mean()) / rewards.std(), atol=1e-4, rtol=1e-3)
    expected = reader.expected_reference_reward(whole)[0, 1:-1]
    torch.testing.assert_close(torch.tensor(trace.channels["expected"].values), expected, atol=1e-5, rtol=1e-4)
    low = [place for stretch in trace.meta["lowest"] for place in range(stretch["start"], stretch["end"])]
    assert sorted(low) == (z <= -1).nonzero()[:, 0].tolist()
    assert low
    worst = trace.meta["lowest"][0]
    assert worst["text"] == "".join(trace.tokens[worst["start"] : worst["end"]])
    assert [s["reward"] for s in trace.meta["lowest"]] == sorted(s["reward"] for s in trace.meta["lowest"])
    assert reader.report(tokenizer, "ab", "t").channels["z"].values == [0.0]


def test_misuse(
    tiny_llama: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InputError, match=r"beta: 0\.0"):
        ImplicitTokenReward(tiny_llama, reference, 0.0)
    with pytest.raises(InputError, match="ref_model: it knows 33 tokens"):
        ImplicitTokenReward(tiny_llama, tiny_model("llama", vocab_size=33))
    reader = ImplicitTokenReward(tiny_llama, reference)
    ids, mask, labels = batch()
    with pytest.raises(InputError, match="a row has no response token"):
        reader.token_rewards(ids, mask, torch.full_like(labels, IGNORED))
    with pytest.raises(InputError, match=r"labels: \[3, 6\]"):
        reader.token_rewards(ids, mask, labels[:, 1:])
    with pytest.raises(InputError, match="prompt, response: empty"):
        reader.report(tokenizer, "ab", "")
