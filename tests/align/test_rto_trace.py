"""The Trace of RTO adds up to what the trainer is given."""

from __future__ import annotations

import pytest

from tests.conftest import tiny_model
from tokenworks.align.rto_trace import rto_trace
from tokenworks.align.scores import token_log_probs
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError


def test_rewards_add_up() -> None:
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    policy, reference, dpo = (tiny_model("llama", seed, vocab_size=257) for seed in range(3))
    prompt, response = [5, 6], [7, 8, 9, 0]
    trace = rto_trace(policy, reference, dpo, tokenizer, prompt, response, reward=0.5, dpo_clip=None)
    old, ref, aligned = (token_log_probs(model, prompt, response) for model in (policy, reference, dpo))
    total = 0.05 * (aligned - ref).sum() - 0.01 * (old - ref).sum() + 0.5
    values = trace.channels["reward"].values
    assert sum(values) == pytest.approx(float(total), abs=1e-5)
    assert trace.channels["to come"].values[0] == pytest.approx(float(total), abs=1e-5)
    parts = zip(trace.channels["token reward"].values, trace.channels["penalty"].values, strict=True)
    for place, (own, (token, penalty)) in enumerate(zip(values, parts, strict=True)):
        assert own == pytest.approx(token + penalty + (0.5 if place == 3 else 0.0), abs=1e-5)


def test_nothing_to_reward() -> None:
    tokenizer = train_bpe(["nothing to merge"], 257)
    model = tiny_model("llama", vocab_size=257)
    with pytest.raises(InputError, match="prompt, response: empty"):
        rto_trace(model, model, model, tokenizer, [1], [], 0.0)
    with pytest.raises(InputError, match="rewards: that of text 0 is nan"):
        rto_trace(model, model, model, tokenizer, [1], [2], float("nan"))
