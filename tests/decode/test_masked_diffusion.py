"""The masked-diffusion model: its loss, its data, and that it is loaded as it was kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.decode.test_freecache_guided_diffusion import llama
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.session import Session, SlotCache
from tokenworks.decode import masked_diffusion
from tokenworks.decode.masked_diffusion import (
    END,
    MASK,
    BidirectionalLlama,
    _Batch,
    _Data,
    addition,
    diffusion_loss,
    load_masked_diffusion,
    train_masked_diffusion,
)


def test_additions_are_right() -> None:
    for number in range(200):
        question, answer = addition(number)
        a, b = question[:-1].split("+")
        steps, result = answer.rstrip("\n").split(";")
        assert int(a) + int(b) == int(result)
        carry = 0
        for place, step in enumerate(steps.split(",")):
            left, right, before = step[:-3].split("+")
            assert (left, right, int(before)) == (a[2 - place], b[2 - place], carry)
            total = int(left) + int(right) + carry
            assert step.endswith(f"={total:02}")
            carry = total // 10
    assert addition(7) == addition(7) != addition(8)


def test_rows_hold_whole_problems_and_never_those_of_the_test() -> None:
    tokenizer = train_bpe(["some words of 12 letters"] * 5, 300, [MASK, END], single_digits=True)
    data = _Data(["a text of words. " * 60] * 2, tokenizer, seed=0)
    batch = data.at(0)
    assert tokenizer.decode(batch.tokens[0]).startswith(addition(10_000)[0])
    questions = tokenizer.decode(batch.tokens[0][~batch.maskable[0]])
    assert questions == "".join(addition(number)[0] for number in (10_000, 10_001, 10_002))
    assert not data.at(1).tokens.equal(batch.tokens)
    assert data.at(2).maskable.all()


def test_digits_are_tokens_of_their_own() -> None:
    tokenizer = train_bpe(["2024 2024 2024 years"] * 50, 300, single_digits=True)
    assert len(tokenizer("2024")["input_ids"]) == 4
    assert tokenizer.decode(tokenizer("in 2024, 12+3=15\n")["input_ids"]) == "in 2024, 12+3=15\n"


def test_the_loss_is_that_of_masked_tokens_weighed_by_their_rate() -> None:
    model = llama(2)
    tokens = torch.randint(1, 29, (4, 40), generator=torch.Generator().manual_seed(0))
    maskable = torch.zeros(4, 40, dtype=torch.bool)
    maskable[:, 10:] = True
    losses = [
        float(diffusion_loss(model, _Batch(tokens, maskable), 0, torch.Generator().manual_seed(seed)))
        for seed in range(60)
    ]
    # Against the definition: for each number of masked tokens the mean over random masks, all rates alike.
    total, chance = 0.0, torch.Generator().manual_seed(9)
    for draw in range(240):
        t = max(0.05, (draw % 60 + 0.5) / 60)
        hidden = maskable[0] & (torch.rand(40, generator=chance) < t)
        if not hidden.any():
            continue
        noisy = tokens[draw % 4].masked_fill(hidden, 0)
        with torch.no_grad():
            logits = model(input_ids=noisy[None], attention_mask=torch.zeros(1, 1, 40, 40)).logits[0, :-1]
        nats = -torch.log_softmax(logits, -1)[torch.arange(39), tokens[draw % 4, 1:]]
        total += float(nats[hidden[1:]].sum()) / t / 30
    assert sum(losses) / 60 == pytest.approx(total / 240, rel=0.05)


def test_a_cached_prefix_is_read_as_if_it_were_run() -> None:
    model, tokens = BidirectionalLlama(llama(3), 0), torch.arange(1, 15)
    cache = SlotCache()
    whole = model.logits(tokens, 0, cache)
    assert torch.allclose(model.logits(tokens, 5, cache), whole[5:], atol=1e-4)
    other = tokens.clone()
    other[12] = 3
    assert not torch.allclose(model.logits(other, 5, cache)[0], whole[5], atol=1e-2), "attention looks both ways"


def test_training_learns_resumes_and_is_loaded_as_it_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_diffusion, "python_docs", lambda split: ["the cat sat on the mat. " * 90])
    monkeypatch.setattr(masked_diffusion, "VOCABULARY", 270)
    monkeypatch.setattr(masked_diffusion, "TOKENS", 240)

    class Cut(Exception):
        pass

    calls = 0

    def cut(done: int, total: int, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:  # in the last round
            raise Cut

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    found = train_masked_diffusion(whole, steps=9, causal_steps=15)
    with pytest.raises(Cut):
        train_masked_diffusion(parts, steps=9, causal_steps=15, progress=cut)
    assert not (parts / "diffusion").exists()
    assert train_masked_diffusion(parts, steps=9, causal_steps=15) == found
    for name in ("diffusion", "guide"):
        one, other = ((folder / name / "model.safetensors").read_bytes() for folder in (whole, parts))
        assert one == other
    assert sorted(path.name for path in parts.iterdir()) == ["diffusion", "guide"], "nothing is left over"
    assert set(found) == {f"{m}, {k}" for m in ("diffusion", "guide") for k in ("additions", "documentation")}
    model, guide, tokenizer = load_masked_diffusion(whole)
    assert model.shifted
    assert model.vocab_size == Session(guide).vocab_size == len(tokenizer) == 270
    assert tokenizer.convert_tokens_to_ids([MASK, END]) == [0, 1]


def test_a_folder_without_models_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no models"):
        load_masked_diffusion(tmp_path)
