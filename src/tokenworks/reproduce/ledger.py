"""Ledger: the finished pieces of a long run, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ledger:
    """JSON lines in a folder of their own; a piece is written as soon as it is done.

    Args:
        folder: kept until `close`; a folder for other settings than these is a different one.
        settings: everything that the pieces depend on. Other settings find nothing to reuse.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "pieces.jsonl"
        self._done: dict[str, Any] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    piece = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that was being written when the run was cut off
                self._done[piece["key"]] = piece["value"]
            self._rewrite()

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` returned (JSON data) the first time this piece was done, in this run or an earlier one."""
        if key not in self._done:
            value = work()
            with self._path.open("a") as out:
                out.write(json.dumps({"key": key, "value": value}) + "\n")
            self._done[key] = value
        return self._done[key]

    def close(self) -> None:
        """The run is complete: forget its pieces."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def _rewrite(self) -> None:
        lines = [json.dumps({"key": key, "value": value}) + "\n" for key, value in self._done.items()]
        self._path.write_text("".join(lines))
