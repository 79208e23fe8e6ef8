"""A view of a model for inference: the same weights, behind tree attention and a faster linear layer.

The user's model is never changed: its module objects are copied, its tensors shared. Three things differ in the
copy. Attention goes through `tree_attention`, which takes any mask. Float32 linear layers on the CPU run on
weights packed once for few rows: by `native` where the machine has a C compiler, else into oneDNN's blocked
layout. And attention's three projections of one input are one product. Packing costs a second copy of the linear
weights in memory.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenworks.core.native import NativeLinear, NativeRMSNorm, library

ATTENTION = "tokenworks_tree"

PACK_WIDTH = 16
"""The number of rows oneDNN is told to expect; a blocked layout chosen for 16 rows also serves 1 and 80."""


SAME_INPUT = ("q_proj", "k_proj", "v_proj")
"""Names under which models keep the three linear layers that attention gives one and the same input."""


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` for float32 on the CPU, on a weight packed into oneDNN's blocked layout.

    Used where there is no C compiler: 1.3 times as fast as `nn.Linear` for one row, 1.7 times for sixteen.

    Args:
        weight: float32 [out, in].
        bias: float32 [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_WIDTH)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class _Joint(nn.Module):
    """One product for several layers that are given the same input; the first of them to be called computes it.

    A small weight read alone leaves a core idle: SmolLM2's three of attention take half the time in one.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.given = self.result = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.given is not x:
            self.given, self.result = x, self.layer(x)
        return self.result

    def forget(self) -> None:
        """Let go of the last input, else the activations of a long prompt would stay in memory."""
        self.given = self.result = torch.empty(0)


class _JointLinear(nn.Module):
    """One of the layers of a `_Joint`: some rows of its weight."""

    def __init__(self, joint: _Joint, rows: slice, last: bool) -> None:
        super().__init__()
        self.joint, self.rows, self.last = joint, rows, last

    def forward(self, x: Tensor) -> Tensor:
        y = self.joint(x)[..., self.rows]
        if self.last:
            self.joint.forget()
        return y


def packed(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The fastest linear layer that this machine has for a weight [out, in] that can be packed."""
    return PackedLinear(weight.contiguous(), bias) if library() is None else NativeLinear(weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether this weight can be packed here: float32, on the CPU, and a PyTorch built with oneDNN."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of T new slots over S cached ones, in the form Hugging Face models call it.

    Args:
        query: [1, heads, T, d].
        key, value: [1, kv_heads, S, d].
        attention_mask: float [1, C, T, S], added to the scores. Channel 0 is for layers that see everything,
            the last channel for layers with a sliding window.

    Returns:
        [1, T, heads, d], and None in place of the attention weights.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    mask = attention_mask[:, :1] if sliding_window is None else attention_mask[:, -1:]
    if softcap is None:
        mixed = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = torch.softmax(softcap * torch.tanh(scores / softcap) + mask, dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(value.dtype), value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, tree_attention)

_views: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[Any, ...], PreTrainedModel]] = (
    weakref.WeakKeyDictionary()
)


def inference_view(model: PreTrainedModel) -> PreTrainedModel:
    """The view of `model`, made on the first call and kept as long as the model lives.

    Made anew if a weight was replaced or changed in place since: a Session opened after a training step sees
    the new weights, one opened before it may not.
    """
    state = tuple((p.data_ptr(), p._version) for p in model.parameters())
    kept = _views.get(model)
    if kept is None or kept[0] != state:
        kept = (state, _make_view(model))
        _views[model] = kept
    return kept[1]


def _make_view(model: PreTrainedModel) -> PreTrainedModel:
    tensors = [*model.parameters(), *model.buffers()]
    view = copy.deepcopy(model, memo={id(t): t for t in tensors})
    view.eval()
    view.set_attn_implementation(ATTENTION)
    for parent in list(view.modules()):
        _join_projections(parent)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, packed(child.weight, child.bias))
            elif type(child) is Conv1D and can_pack(child.weight):
                setattr(parent, name, packed(child.weight.t(), child.bias))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _faster_norm(child))
    return view


def _faster_norm(norm: nn.Module) -> nn.Module:
    """The compiled layer that does what `norm` does, or `norm` itself.

    Some models scale by the weight and some by one more than it, so this tries which gives the same numbers.
    """
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or epsilon is None or not can_pack(weight) or library() is None:
        return norm
    x = torch.linspace(-2, 3, 2 * len(weight)).view(1, 2, -1)
    for scale in (weight, 1 + weight):
        native = NativeRMSNorm(scale, epsilon)
        if torch.allclose(native(x), norm(x), atol=1e-5):
            return native
    return norm


def _join_projections(parent: nn.Module) -> None:
    layers = [getattr(parent, name, None) for name in SAME_INPUT]
    joinable = [layer for layer in layers if type(layer) is nn.Linear and can_pack(layer.weight)]
    if len(joinable) < len(SAME_INPUT) or len({(x.in_features, x.bias is None) for x in joinable}) > 1:
        return
    biases = tuple(layer.bias for layer in joinable if layer.bias is not None)
    weights = tuple(layer.weight for layer in joinable)
    joint = _Joint(packed(torch.cat(weights), torch.cat(biases) if biases else None))
    end = 0
    for name, layer in zip(SAME_INPUT, joinable, strict=True):
        start, end = end, end + layer.out_features
        setattr(parent, name, _JointLinear(joint, slice(start, end), name == SAME_INPUT[-1]))
