"""Where tokenworks keeps files, and how it writes them so that nobody ever reads half of one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from platformdirs import user_cache_path

from tokenworks.core.errors import CacheError


def cache_folder() -> Path:
    """The user's cache folder for tokenworks; `TOKENWORKS_CACHE` overrides it."""
    chosen = os.environ.get("TOKENWORKS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("tokenworks", appauthor=False)


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends well, delete it otherwise.

    Raises:
        CacheError: the disk is full or the folder cannot be written; `path` is as it was before.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as out:
            yield out
        # A temporary file is its owner's alone; what it becomes is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def disk_error(error: OSError, path: Path) -> CacheError:
    """Say what an `OSError` while writing `path` means to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(f"{path}: the disk is full. Free some space, or set TOKENWORKS_CACHE to another disk.")
    return CacheError(f"{path}: cannot write ({error.strerror or error}). Check the folder's permissions.")
