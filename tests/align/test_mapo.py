"""MaPO: masks of activations by hand, over the response alone, and hooks that never stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from tests.conftest import CONFIGS, tiny_model
from tokenworks.align.mapo import KINDS, activation_scores
from tokenworks.core.errors import InputError, UnsupportedModelError

PROMPT, RESPONSE = [1, 2, 3], [4, 5, 6, 7, 8]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def rescaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def test_the_residual_of_a_llama_by_hand() -> None:
    """Every site recomputed from the layers' own states."""
    model = tiny_model("llama")
    own = model.model
    ids = torch.tensor([PROMPT + RESPONSE])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        sites = [own.embed_tokens(ids), states[-1]]
        rope = own.rotary_emb(states[0], torch.arange(ids.shape[1])[None])
        for layer, into in zip(own.layers, states, strict=False):
            normed = layer.input_layernorm(into)
            attended = layer.self_attn(normed, rope, None, is_causal=True)[0]
            between = into + attended
            half = layer.post_attention_layernorm(between)
            moved = layer.mlp(half)
            sites += [normed, attended, between, half, moved, between + moved]
    places = slice(len(PROMPT) - 1, -1)
    expected = torch.stack([rescaled(site[0, places].mean(-1)) for site in sites]).mean(0)
    found = activation_scores(model, ["residual"])(PROMPT, RESPONSE)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)


def test_attention_and_mlp_of_a_gpt2_by_hand() -> None:
    """The joint projection and the values before the last one; not the MLP's projection of the same name."""
    model = tiny_model("gpt2")
    seen: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    handles = []
    for block in model.transformer.h:
        handles += [
            block.attn.c_attn.register_forward_hook(lambda _, __, out: seen["attention"].append(out)),
            block.attn.c_proj.register_forward_pre_hook(lambda _, into: seen["attention"].append(into[0])),
            block.mlp.act.register_forward_hook(lambda _, __, out: seen["mlp"].append(out)),
        ]
    with torch.no_grad():
        model(torch.tensor([PROMPT + RESPONSE]))
    for handle in handles:
        handle.remove()
    places = slice(len(PROMPT) - 1, -1)
    parts = [torch.stack([rescaled(s[0, places].mean(-1)) for s in seen[kind]]).mean(0) for kind in seen]
    for kinds, expected in (
        (["attention"], parts[0]),
        (["mlp"], parts[1]),
        (["mlp", "attention"], sum(parts) / 2),
    ):
        found = torch.tensor(activation_scores(model, kinds)(PROMPT, RESPONSE))
        torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_queries_and_keys_count_as_they_are_and_as_they_are_rotated(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the model's own attention is given."""
    model = tiny_model(kind)
    seen: list[Tensor] = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.extend(heads.transpose(1, 2).flatten(2) for heads in (query, key))
        return sdpa_attention_forward(module, query, key, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    handles = []
    for name, module in model.named_modules():
        if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "query_key_value"):
            handles.append(module.register_forward_hook(lambda _, __, out: seen.append(out)))
        if name.split(".")[-1] in ("o_proj", "dense") and "mlp" not in name:
            handles.append(module.register_forward_pre_hook(lambda _, into: seen.append(into[0])))
    with torch.no_grad():
        model(torch.tensor([PROMPT + RESPONSE]))
    for handle in handles:
        handle.remove()
    per_layer = 4 if kind == "gpt_neox" else 6
    assert len(seen) == per_layer * model.config.num_hidden_layers
    places = slice(len(PROMPT) - 1, -1)
    expected = torch.stack([rescaled(site[0, places].mean(-1)) for site in seen]).mean(0)
    found = activation_scores(model, ["attention"])(PROMPT, RESPONSE)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_architecture_has_sites_of_every_kind(kind: str) -> None:
    model = tiny_model(kind)
    for mapping in ("rescale", "sigmoid"):
        found = activation_scores(model, mapping=mapping)(PROMPT, RESPONSE)
        assert len(found) == len(RESPONSE)
        assert all(0 <= number <= 1 for number in found)
        assert len(set(found)) == len(found)
    assert hooks(model) == 0


def test_z_scores_before_rescaling_change_nothing() -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        rescaled((values - values.mean()) / values.std()), rescaled(values), atol=1e-6, rtol=0
    )


def test_the_mask_sees_the_whole_response_but_not_the_prompt(tiny_llama: PreTrainedModel) -> None:
    """A counter-example to causality: the last token changes masks before it. Sigmoids do not look ahead."""
    for mapping, ahead in (("rescale", True), ("sigmoid", False)):
        scores = activation_scores(tiny_llama, mapping=mapping)
        one, other = scores(PROMPT, [*RESPONSE, 9, 10]), scores(PROMPT, [*RESPONSE, 60, 10])
        changed = max(abs(a - b) for a, b in zip(one[: len(RESPONSE)], other, strict=False))
        assert (changed > 1e-3) == ahead
    # Its own token is not what a mask is of: the state that predicts it is.
    scores = activation_scores(tiny_llama)
    assert scores(PROMPT, [*RESPONSE, 9]) == pytest.approx(scores(PROMPT, [*RESPONSE, 60]), abs=1e-6)
    # The extremes are those of the response, wherever the prompt's are.
    shallow = activation_scores(tiny_model("llama", num_hidden_layers=1), ["mlp"])(PROMPT, RESPONSE)
    assert (min(shallow), max(shallow)) == (0, 1)


def test_one_token_and_equal_tokens_count(tiny_llama: PreTrainedModel) -> None:
    assert activation_scores(tiny_llama)(PROMPT, [4]) == [1]
    # The same token everywhere: every position attends to equals, and only rounding and rotation tell them apart.
    assert activation_scores(tiny_llama, ["mlp", "residual"])([9], [9] * 6) == pytest.approx([1] * 6)


def test_hooks_go_with_an_error() -> None:
    model = tiny_model("llama")
    plain = modeling_llama.apply_rotary_pos_emb
    scores = activation_scores(model)
    with pytest.raises(IndexError):
        scores(PROMPT, [4, 5000])  # no such token
    assert hooks(model) == 0

    class Broken(RuntimeError):
        pass

    def breaks(*_: object) -> None:
        raise Broken

    handle = model.model.layers[1].mlp.register_forward_pre_hook(breaks)
    with pytest.raises(Broken):
        scores(PROMPT, RESPONSE)
    handle.remove()
    assert hooks(model) == 0
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_misuse() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=rf"kinds: no logits; there are {', '.join(KINDS)}"):
        activation_scores(model, ["logits"])
    with pytest.raises(InputError, match="kinds: no kind given"):
        activation_scores(model, [])
    with pytest.raises(InputError, match="mapping: no 'layernorm'; there are rescale, sigmoid"):
        activation_scores(model, mapping="layernorm")
    with pytest.raises(InputError, match="prompt, response: empty"):
        activation_scores(model)(PROMPT, [])
    for layer in model.model.layers:
        layer.mlp.gate = layer.mlp._modules.pop("act_fn")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no mlp module under a known name"):
        activation_scores(model)
