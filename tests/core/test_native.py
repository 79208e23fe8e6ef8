"""The compiled linear layer: the numbers of `nn.Linear`, the same bits at every width, and its absence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import tiny_model
from tokenworks.core import native
from tokenworks.core.native import NativeLinear, NativeRMSNorm, library, native_name
from tokenworks.core.packing import PackedLinear, can_pack, inference_view
from tokenworks.core.session import Session

needs_compiler = pytest.mark.skipif(library() is None, reason="this machine has no C compiler with OpenMP")


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder without compiled code."""
    monkeypatch.setenv("TOKENWORKS_CACHE", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 5), (33, 48), (200, 64)])  # without rest and with
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_linear(outputs: int, inputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    mine = NativeLinear(linear.weight, linear.bias)
    with torch.no_grad():
        for rows in (1, 2, 5, 6, 7, 13, 48, 49, 100):  # around the sizes of a tile and of a panel
            x = torch.randn(1, rows, inputs)
            torch.testing.assert_close(mine(x), linear(x))


@needs_compiler
def test_a_row_has_the_same_bits_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    mine = NativeLinear(torch.randn(50, 300), None)
    x = torch.randn(1, 60, 300)
    together = mine(x)
    for rows in (1, 4, 6, 11, 59):
        assert torch.equal(mine(x[:, :rows]), together[:, :rows])
    assert torch.equal(mine(x[:, ::7]), together[:, ::7])  # not contiguous


@needs_compiler
def test_it_is_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None
    (made,) = (empty_cache / "native").iterdir()
    library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library() is not None
    assert native_name() == f"native {made.stem[:8]}"


def test_without_a_compiler_the_session_runs_on_onednn(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    model = tiny_model("llama")
    if not can_pack(next(model.parameters())):
        pytest.skip("this PyTorch has no oneDNN linear layer")
    assert library() is None
    assert native_name() is None
    assert any(isinstance(module, PackedLinear) for module in inference_view(model).modules())
    with torch.no_grad():
        own = model(torch.tensor([[1, 2, 3]])).logits[0]
    torch.testing.assert_close(Session(model).extend([1, 2, 3]), own, atol=1e-4, rtol=1e-4)


def test_a_compiler_that_fails_is_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    assert library() is None
    assert not list(empty_cache.rglob("*.so"))


@needs_compiler
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # scaled by the weight, and by one more
def test_it_is_the_models_own_normalisation(kind: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(kind)
    for parameter in model.parameters():
        parameter.data.normal_()
    own = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    assert own
    view = dict(inference_view(model).named_modules())
    for name, norm in own.items():
        x = torch.randn(1, 7, len(norm.weight))
        assert isinstance(view[name], NativeRMSNorm)
        with torch.no_grad():
            torch.testing.assert_close(view[name](x), norm(x))
