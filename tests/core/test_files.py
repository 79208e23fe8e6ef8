"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tokenworks.core.errors import CacheError
from tokenworks.core.files import atomic_write, cache_folder


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new" / "f.txt") as out:
        out.write("all")
        assert not (tmp_path / "new" / "f.txt").exists()
    assert (tmp_path / "new" / "f.txt").read_text() == "all"
    (tmp_path / "usual").touch()
    assert (tmp_path / "new" / "f.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "f").write_text("old")

    def fail() -> None:
        with atomic_write(tmp_path / "f") as out:
            out.write("half")
            raise stop

    with pytest.raises(stop):
        fail()
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(CacheError, match=r"f: the disk is full"), atomic_write(tmp_path / "f"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write"), atomic_write(tmp_path / "file" / "f"):
        pass


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENWORKS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TOKENWORKS_CACHE")
    assert cache_folder().name == "tokenworks"
