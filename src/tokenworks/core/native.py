"""The one piece of tokenworks that is not Python: float32 layers for the few rows of a draft tree.

oneDNN and MKL are made for many rows; for a dozen they leave half of the memory's bandwidth unused, and it is the
bandwidth that decoding is bound by. A normalisation in PyTorch is eight small operations. `native.c` is compiled
once with the machine's own C compiler, for its own processor, into the cache folder. Without a compiler nothing is
lost but the speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from torch import Tensor, nn

from tokenworks.core.errors import CacheError
from tokenworks.core.files import atomic_write, cache_folder

OUTPUTS = 16
"""Outputs in a block of the layout that `native.c` reads."""


class NativeLinear(nn.Module):
    """`x @ weight.T + bias` in float32 on the CPU. A row's result does not depend on the rows beside it.

    Args:
        weight: float32 [out, in].
        bias: float32 [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        blocks = -(-self.out_features // OUTPUTS)
        padded = weight.new_zeros(blocks * OUTPUTS, self.in_features)
        padded[: self.out_features] = weight.detach()
        self.blocks = padded.view(blocks, OUTPUTS, self.in_features).transpose(1, 2).contiguous()
        self.bias = weight.new_zeros(blocks * OUTPUTS)
        if bias is not None:
            self.bias[: self.out_features] = bias.detach()
        self._linear = library().linear  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        pointers = x.data_ptr(), self.blocks.data_ptr(), self.bias.data_ptr(), y.data_ptr()
        self._linear(*pointers, rows, self.in_features, self.out_features)
        return y


class NativeRMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + epsilon) * scale` in float32 on the CPU, over the last dimension.

    Args:
        scale: float32 [d].
    """

    def __init__(self, scale: Tensor, epsilon: float) -> None:
        super().__init__()
        self.scale, self.epsilon = scale.detach(), epsilon
        self._rms_norm = library().rms_norm  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, width = x.new_empty(x.shape), len(self.scale)
        pointers = x.data_ptr(), self.scale.data_ptr(), y.data_ptr()
        self._rms_norm(*pointers, x.numel() // width, width, self.epsilon)
        return y


@cache
def library() -> ctypes.CDLL | None:
    """`native.c`, compiled for this machine on the first call ever; None if it has no C compiler with OpenMP."""
    source = files("tokenworks.core").joinpath("native.c").read_bytes()
    path = cache_folder() / "native" / f"{hashlib.sha256(source + _processor()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _compile(source, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, CacheError, subprocess.CalledProcessError):
        return None
    loaded.linear.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
    loaded.rms_norm.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_float]
    loaded.linear.restype = loaded.rms_norm.restype = None
    return loaded


def native_name() -> str | None:
    """The compiled code's name, which says its version and the processor it is for; None without it."""
    found = library()
    return None if found is None else f"native {Path(found._name).stem[:8]}"


def _compile(source: bytes, target: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        code, parts, built = (Path(folder, name) for name in ("native.c", "native.o", "native.so"))
        code.write_bytes(source)
        options = ["-O3", "-march=native", "-fPIC", "-fopenmp"]
        run = {"check": True, "capture_output": True}
        subprocess.run([*compiler.split(), *options, "-c", code, "-o", parts], **run)  # type: ignore[call-overload]
        # Linked without OpenMP: its functions are then found in PyTorch's, and both share one pool of threads.
        subprocess.run([*compiler.split(), "-shared", parts, "-o", built], **run)  # type: ignore[call-overload]
        with atomic_write(target, "wb") as out:
            out.write(built.read_bytes())


def _processor() -> bytes:
    """What the processor is and can do, as far as Linux says it: code compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [
        next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features")
    ]
    return "\n".join([platform.machine(), *told]).encode()
