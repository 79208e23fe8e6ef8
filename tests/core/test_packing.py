"""The inference view: the same numbers from packed weights, the user's model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import CONFIGS, tiny_model
from tokenworks.core.native import NativeLinear
from tokenworks.core.packing import SAME_INPUT, PackedLinear, can_pack, inference_view, tree_attention
from tokenworks.core.session import Session

FAST = (NativeLinear, PackedLinear)


@pytest.mark.parametrize("width", [1, 3, 16, 81])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_linear(width: int, bias: bool) -> None:
    linear = nn.Linear(48, 33, bias=bias)
    if not can_pack(linear.weight):
        pytest.skip("this PyTorch has no oneDNN linear layer")
    x = torch.randn(1, width, 48)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear.weight, linear.bias)(x), linear(x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_view_shares_what_it_does_not_pack(kind: str) -> None:
    model = tiny_model(kind)
    view = inference_view(model)
    assert inference_view(model) is view
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in view.parameters())
    packable = can_pack(next(model.parameters()))
    assert any(isinstance(module, FAST) for module in view.modules()) == packable
    assert not any(isinstance(module, FAST) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", 2), ("qwen2", 2), ("opt", 2)]
)  # without bias, with, scaled
def test_projections_of_one_input_are_one_product(kind: str, layers: int) -> None:
    model = tiny_model(kind, num_hidden_layers=layers)
    if not can_pack(next(model.parameters())):
        pytest.skip("this PyTorch has no oneDNN linear layer")
    own = {name: layer for name, layer in model.named_modules() if name.endswith(SAME_INPUT)}
    view = {name: layer for name, layer in inference_view(model).named_modules() if name.endswith(SAME_INPUT)}
    assert len(own) == len(view) == 3 * layers
    for order in (SAME_INPUT, SAME_INPUT[::-1], SAME_INPUT):
        for name in own:
            attention, x = name.rsplit(".", 1)[0], torch.randn(1, 4, own[name].in_features)
            for part in (f"{attention}.{projection}" for projection in order):
                with torch.no_grad():
                    torch.testing.assert_close(view[part](x), own[part](x))
    assert not any(layer.joint.result.numel() for layer in view.values()), "a prompt's activations stay in memory"


def test_half_precision_is_left_unpacked_and_still_runs() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    view = inference_view(model)
    assert not any(isinstance(module, FAST) for module in view.modules())
    logits = Session(model).extend([1, 2, 3])
    assert logits.dtype == torch.float32
    with torch.no_grad():
        own = model(torch.tensor([[1, 2, 3]])).logits[0].float()
    torch.testing.assert_close(logits, own, atol=0.1, rtol=0.1)


def test_attention_with_grouped_queries_window_and_softcap() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(1, 2, 3, 5).masked_fill_(torch.rand(1, 2, 3, 5) < 0.4, torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    for window, channel in ((None, 0), (6, 1)):
        for cap in (None, 2.0):
            found, _ = tree_attention(nn.Module(), query, key, value, mask, 0.3, window, cap)
            keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
            scores = query @ keys.transpose(-1, -2) * 0.3
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            expected = torch.softmax(scores + mask[:, channel : channel + 1], -1) @ values
            torch.testing.assert_close(found, expected.transpose(1, 2))
    with pytest.raises(NotImplementedError, match="sinks"):
        tree_attention(nn.Module(), query, key, value, mask, s_aux=torch.zeros(4))
