"""The draft model that is distilled: small, with shared embeddings, resumable; and the one that is kept here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.selftext import SelfText
from tokenworks.core.session import Session
from tokenworks.decode import distil as distilling
from tokenworks.decode.distil import distil, frequent_ids, load_draft, small_copy


@pytest.fixture
def target() -> PreTrainedModel:
    return tiny_model("llama", seed=5, vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["hello world, this is a tokenizer"] * 9, 270)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "VOCABULARY", 128)
    original = distilling.write_text
    monkeypatch.setattr(
        distilling, "write_text", lambda *args, seed: original(*args, length=24, seed=seed, rows=6)
    )


def test_it_learns_what_the_target_writes(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = distil(target, tokenizer, tmp_path, layers=(0, 2), batches=4, steps=60, learning_rate=3e-3)
    draft = load_draft(target, 300, tmp_path)
    untrained = small_copy(target, (0, 2), draft.vocabulary)
    rows = distilling._Rows([distilling.write_text(target, tokenizer, seed=9)], target, draft.vocabulary)
    assert set(found) == {"overlap", "agreement", "coverage"}
    assert 0 < found["overlap"] <= found["coverage"] <= 1
    assert rows.quality(draft.session.model)["overlap"] > rows.quality(untrained)["overlap"]  # type: ignore[attr-defined]
    assert not (tmp_path / "unfinished").exists()
    assert (tmp_path / "model.safetensors").stat().st_size < 60_000


def test_loading_gives_back_what_was_trained(target: PreTrainedModel, tmp_path: Path) -> None:
    vocabulary = torch.arange(10, 138)
    draft = small_copy(target, (0, 2), vocabulary)
    for parameter in distilling._own(draft).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    distilling.save_draft(draft, vocabulary, (0, 2), tmp_path, {})
    again = load_draft(target, 300, tmp_path)
    assert torch.equal(again.vocabulary, vocabulary)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        theirs, ours = again.session.model(ids).logits, draft(ids).logits  # type: ignore[attr-defined]
    # 8-bit rows: within a percent or so of the spread.
    assert float((theirs - ours).std() / ours.std()) < 0.05


def test_only_the_layers_are_its_own(target: PreTrainedModel) -> None:
    draft = small_copy(target, (1,), torch.arange(20))
    assert len(draft.model.layers) == 1
    assert draft.config.num_hidden_layers == 1
    assert target.config.num_hidden_layers == 3
    assert draft.get_input_embeddings().weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()
    trained = {name for name, p in draft.named_parameters() if p.requires_grad}
    assert trained == set(distilling._own(draft))
    assert not any("embed" in name or "head" in name for name in trained)
    assert all(p.requires_grad for p in target.parameters()), "the target is not changed"
    layer = target.model.layers[1].mlp.up_proj.weight
    assert draft.model.layers[0].mlp.up_proj.weight.data_ptr() != layer.data_ptr()
    assert torch.equal(draft.model.layers[0].mlp.up_proj.weight, layer)


def test_a_run_that_is_cut_off_gives_the_same_draft(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"layers": (0,), "batches": 2, "steps": 210}
    distil(target, tokenizer, whole, **settings)  # type: ignore[arg-type]

    class Cut(Exception):
        pass

    def cut(done: int, total: int, what: str) -> None:
        if what.startswith("loss") and done == 150:
            raise Cut

    with pytest.raises(Cut):
        distil(target, tokenizer, parts, progress=cut, **settings)  # type: ignore[arg-type]
    assert not (parts / "model.safetensors").exists()
    distil(target, tokenizer, parts, **settings)  # type: ignore[arg-type]
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_ids_written_most_are_kept() -> None:
    tokens = torch.tensor([[7] * 5 + [3] * 4 + [9] * 3])
    text = SelfText(tokens, torch.zeros(1, 12, 4), torch.ones_like(tokens, dtype=torch.bool))
    distilling.VOCABULARY = 3
    assert frequent_ids([text], 20).tolist() == [3, 7, 9]


def test_clear_errors(target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batches: 1"):
        distil(target, tokenizer, tmp_path, batches=1)
    with pytest.raises(InputError, match=r"layers: \[3\]"):
        small_copy(target, [3], torch.arange(4))
    with pytest.raises(InputError, match="holds no draft model"):
        load_draft(target, 300, tmp_path)
    with pytest.raises(InputError, match=r"draft-model: .*another target.*tokenworks train draft"):
        load_draft(target, 300)


@pytest.mark.model
def test_the_draft_that_is_kept_fits_smollm2() -> None:
    from tokenworks.core.models import load

    loaded = load("smollm2-135m")
    session = Session(loaded.model)
    draft = load_draft(loaded.model, session.vocab_size)
    assert len(draft.vocabulary) == 12288
    assert len(draft.session.model.model.layers) == 2  # type: ignore[attr-defined]
