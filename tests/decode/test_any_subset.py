"""Any-subset models: what each position may see, and that training teaches the same conditionals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from tokenworks.core.errors import InputError
from tokenworks.decode import any_subset
from tokenworks.decode.any_subset import (
    RATES,
    XLNet,
    any_subset_loss,
    draft_mask,
    lattice_order,
    load_any_subset,
    masking_rate,
    oracle_mask,
    some_holes,
    train_any_subset,
)


def tiny_xlnet(vocab_size: int = 11, layers: int = 3) -> XLNet:
    """A random model whose conditionals differ clearly."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=vocab_size, d_model=16, n_layer=layers, n_head=2, d_inner=24, mem_len=None)
    model = XLNetLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.2) + (
                1.0 if parameter.dim() == 1 else 0.0))  # fmt: skip
    return XLNet(model, 0)


def test_the_lattice_goes_through_visible_positions_then_holes_from_left_to_right() -> None:
    rank, start = lattice_order(torch.tensor([True, False, False, True, True, False]))
    assert (rank.tolist(), start) == ([3, 0, 1, 4, 5, 2], 3)
    rank, start = lattice_order(torch.zeros(4, dtype=torch.bool))
    assert (rank.tolist(), start) == ([0, 1, 2, 3], 4)


def test_masks_hide_what_comes_later() -> None:
    rank, start = torch.tensor([2, 0, 1, 3, 4]), 2
    oracle = oracle_mask(rank, start)
    for i in range(5):
        for j in range(5):
            visible = rank[i] < start and rank[j] < start
            assert bool(oracle[i, j]) == bool(rank[i] <= rank[j] and not visible)
    draft = draft_mask(rank, start, 3)
    assert draft[3].tolist() == draft[4].tolist() == [False, False, False, True, True]
    assert draft[0].tolist() == oracle[0].tolist(), "what is decided keeps its view"
    assert draft_mask(rank, start, 5).equal(oracle)


def test_nothing_leaks_from_later_ranks() -> None:
    """In any layer and either stream: a leak anywhere would reach the logits of some target."""
    model = tiny_xlnet(layers=4)
    for seed in range(4):
        chance = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, 11, (9,), generator=chance)
        holes = torch.rand(9, generator=chance) < 0.7
        holes[int(torch.randint(9, (1,), generator=chance))] = False
        rank, start = lattice_order(holes)
        mask, everywhere = oracle_mask(rank, start), torch.arange(9)
        before = model.logits(tokens, mask, everywhere)
        for changed in holes.nonzero()[:, 0].tolist():
            other = tokens.clone()
            other[changed] = tokens[changed] % 10 + 1
            after = model.logits(other, mask, everywhere)
            earlier = holes & (rank <= rank[changed])
            assert torch.allclose(before[earlier], after[earlier], atol=1e-5)
            later = holes & (rank > rank[changed])
            assert not later.any() or (before[later] - after[later]).abs().amax(-1).min() > 1e-4, "they do see it"


def test_the_loss_is_the_mean_of_exact_conditionals() -> None:
    model = tiny_xlnet()
    tokens = torch.tensor([[3, 4, 5, 6, 7], [1, 2, 9, 8, 7]])
    holes = torch.tensor([False, True, True, False, True])
    rank, start = lattice_order(holes)
    nats = []
    for row in tokens:
        for decided, hole in ((2, 1), (3, 2), (4, 4)):
            logits = model.logits(row, draft_mask(rank, start, decided), torch.tensor([hole]))[0]
            nats.append(-float(torch.log_softmax(logits, -1)[row[hole]]))
    with torch.no_grad():
        assert float(any_subset_loss(model.model, tokens, holes)) == pytest.approx(sum(nats) / 6, abs=1e-4)


def test_more_is_masked_as_training_goes_on() -> None:
    assert masking_rate(0, 1000, 0.5) == pytest.approx(0.15)
    assert masking_rate(100, 1000, 0.0) == masking_rate(900, 1000, 0.0) == pytest.approx(RATES[0])
    assert masking_rate(100, 1000, 1.0) == pytest.approx(RATES[1])
    shares = [
        float(some_holes(step, 8, 128, torch.Generator().manual_seed(step)).float().mean()) for step in range(8)
    ]
    assert shares[4] < shares[5] < shares[6] < shares[7], "four steps in a row take a quarter of the rates each"
    for length in (2, 128):
        assert 0 < int(some_holes(7, 8, length, torch.Generator().manual_seed(0)).sum()) < length


def test_training_learns_resumes_and_is_loaded_as_it_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the cat sat on the mat. " * 30, "a dog ran in the park. " * 30]
    monkeypatch.setattr(any_subset, "python_docs", lambda split: texts)
    monkeypatch.setattr(any_subset, "LENGTH", 24)
    monkeypatch.setattr(any_subset, "BATCH", 3)
    short = tmp_path / "short"
    before = train_any_subset(short, steps=1)

    class Cut(Exception):
        pass

    def cut(done: int, total: int, what: str) -> None:
        if done == 102:
            raise Cut

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    after = train_any_subset(whole, steps=104)
    with pytest.raises(Cut):
        train_any_subset(parts, steps=104, progress=cut)
    assert not (parts / "model.safetensors").exists()
    assert train_any_subset(parts, steps=104) == after
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert all(after[name] < 0.8 * before[name] for name in after)
    model, tokenizer = load_any_subset(whole)
    assert tokenizer.decode(tokenizer("the  cat\n")["input_ids"]) == "the  cat\n"
    assert model.logits(torch.arange(1, 6), torch.zeros(5, 5) > 0, torch.tensor([2])).shape == (1, len(tokenizer))
    assert sorted(path.name for path in whole.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no any-subset model"):
        load_any_subset(tmp_path)
