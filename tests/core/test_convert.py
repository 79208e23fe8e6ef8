"""Made once, and whole or not at all: two processes, a kill, a full disk, damaged files."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError

from tokenworks.core.convert import MANIFEST, make_once, whole
from tokenworks.core.errors import CacheError, ModelNotFoundError

fork = multiprocessing.get_context("fork")
QUIET = Console(quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models" / "tiny"


def write(target: Path) -> None:
    (target / "model.safetensors").write_bytes(b"weights")


def never(target: Path) -> None:
    raise AssertionError("was built again")


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_made_once_and_noted(folder: Path) -> None:
    assert make_once(folder, 0, write, QUIET) == folder
    assert make_once(folder, 0, never, QUIET) == folder
    facts = json.loads((folder / MANIFEST).read_text())["files"]["model.safetensors"]
    assert facts == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert contents(folder) == ["tiny", "tiny.lock"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"weig"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"format": 0, "files": {}}'),
    ],
    ids=["truncated", "missing", "no manifest", "half a manifest", "strange manifest", "older format"],
)
def test_damaged_is_made_again(folder: Path, damage: Callable[[Path], object]) -> None:
    make_once(folder, 0, write, QUIET)
    damage(folder)
    assert not whole(folder)
    make_once(folder, 0, write, QUIET)
    assert whole(folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CacheError, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), CacheError, "permissions"),
        (SafetensorError("I/O error"), CacheError, "cannot write the weights"),
        (ModelNotFoundError("model: wrong hash"), ModelNotFoundError, "wrong hash"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_failure_leaves_nothing(
    folder: Path, error: BaseException, seen: type[BaseException], message: str | None
) -> None:
    def fail(target: Path) -> None:
        write(target)
        raise error

    with pytest.raises(seen, match=message):
        make_once(folder, 0, fail, QUIET)
    assert contents(folder) == ["tiny.lock"]
    make_once(folder, 0, write, QUIET)
    assert whole(folder)


def test_failed_repair_keeps_what_was_there(folder: Path) -> None:
    make_once(folder, 0, write, QUIET)
    (folder / MANIFEST).unlink()
    with pytest.raises(AssertionError):
        make_once(folder, 0, never, QUIET)
    assert (folder / "model.safetensors").exists()


def test_too_little_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2e9, 1e9, 1e9))
    with pytest.raises(
        CacheError, match=rf"{folder.parent}: 1\.2 GB are needed, 1\.0 GB are free.*TOKENWORKS_CACHE"
    ):
        make_once(folder, 1.2, never, QUIET)


def test_cache_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(CacheError, match="cannot write"):
        make_once(tmp_path / "models" / "tiny", 0, never, QUIET)


def test_two_processes_build_once(folder: Path, tmp_path: Path) -> None:
    def slow(target: Path) -> None:
        (tmp_path / f"built-by-{os.getpid()}").touch()
        time.sleep(0.5)
        write(target)

    both = [fork.Process(target=make_once, args=(folder, 0, slow, QUIET)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [process.exitcode for process in both] == [0, 0]
    assert whole(folder)
    assert len(list(tmp_path.glob("built-by-*"))) == 1
    assert contents(folder) == ["tiny", "tiny.lock"]


def test_killed_run_is_cleaned_up_by_the_next(folder: Path) -> None:
    def stuck(target: Path) -> None:
        write(target)
        (folder.parent / "ready").touch()
        time.sleep(60)

    process = fork.Process(target=make_once, args=(folder, 0, stuck, QUIET))
    process.start()
    deadline = time.monotonic() + 20
    while not (folder.parent / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder.parent / "ready").unlink()
    assert not folder.exists()
    assert len([name for name in contents(folder) if name.startswith(".tiny-")]) == 1
    make_once(folder, 0, write, QUIET)
    assert contents(folder) == ["tiny", "tiny.lock"]
