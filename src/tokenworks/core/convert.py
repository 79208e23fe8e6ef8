"""GGUF to a Hugging Face folder with float32 weights: once, and whole or not at all.

transformers reads GGUF files itself, but takes half a minute each time, drops SmolLM2's digit splitting, and marks
the weights as quantized. A conversion is made in a temporary folder and renamed when it is whole; a lock keeps two
processes from making the same one.
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
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from filelock import FileLock, Timeout
from gguf import GGUFReader
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tokenworks.core.errors import CacheError, ModelNotFoundError, TokenworksError, UnsupportedModelError
from tokenworks.core.files import disk_error

MANIFEST = "tokenworks.json"
FORMAT = 1
"""Of the converted folders. A higher number makes every older folder be converted anew."""


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
        with no_bars(), redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise _gguf_error(gguf, error) from error
    model, facts = loaded
    check_complete(facts, gguf)
    _repair_smollm(gguf, tokenizer)
    # Stated, because `converted_tokenizer` does not know the defaults of the model's own tokenizer class.
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
    if (length := getattr(model.config, "max_position_embeddings", None)) is not None:
        tokenizer.model_max_length = length
    # The weights are plain float32 now: saving must not take them for quantized ones.
    del model.config.quantization_config, model.hf_quantizer, model.is_quantized
    if stop_ids:
        c = model.config
        model.generation_config = GenerationConfig(
            bos_token_id=c.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=c.pad_token_id
        )
    with no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_error(gguf: Path, error: Exception) -> TokenworksError:
    try:
        GGUFReader(gguf)
    except Exception:
        return ModelNotFoundError(f"model: {gguf} is damaged or cut short ({brief(error)}). Fetch it again.")
    return UnsupportedModelError(f"model: transformers cannot read what {gguf} holds ({brief(error)}).")


def _repair_smollm(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a "smollm" GGUF tokenizer back its digit splitting, which transformers' reader drops.

    Without it "\\n\\n1." reads as two single newlines, as the model never saw it in training.
    """
    with gguf.open("rb") as file:
        if b"tokenizer.ggml.pre\x08\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00smollm" in file.read(8 << 20):
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )


def make_once(folder: Path, gigabytes: float, build: Callable[[Path], None], console: Console) -> Path:
    """`folder`, made by `build` unless it is there and whole.

    Args:
        gigabytes: that must be free on the disk, in 10^9 bytes.
        build: fills the empty folder it is given. What it raises leaves nothing behind.
        console: where a wait for another process is shown.

    Raises:
        CacheError: too little space, or the folder cannot be written.
    """
    if whole(folder):
        return folder
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock"), console):
            if whole(folder):  # another process made it while this one waited
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


def _seal(folder: Path) -> None:
    """Force a finished folder to the disk, and note what is in it."""
    files = {}
    for path in folder.iterdir():
        with path.open("r+b") as file:  # fsync wants a file that may be written, on some systems
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w") as out:
        json.dump({"format": FORMAT, "files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def whole(folder: Path) -> bool:
    """Whether every file that was written to a converted folder is still there in its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def converted_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that `convert` made.

    `AutoTokenizer` gives the same one, but parses tokenizer.json several times over: 3 s more for Gemma.
    """
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("tokenizer_class", "backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if (template := folder / "chat_template.jinja").exists():
        settings["chat_template"] = template.read_text()
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)


def check_complete(facts: dict[str, Any], source: str | Path) -> None:
    """Refuse a model some of whose weights were not in `source`: transformers leaves those random, with a warning.

    Raises:
        ModelNotFoundError: weights are missing; the message names one.
    """
    if missing := sorted(facts["missing_keys"]):
        raise ModelNotFoundError(
            f"model: '{source}' lacks {len(missing)} of the model's weights, such as {missing[0]}. "
            "Is it complete, and a language model?"
        )


def brief(error: Exception) -> str:
    """Its message on one line, without the long list of alternatives that some end in."""
    return shorten(str(error), 240, placeholder=" ...") or type(error).__name__


def console_for(progress: bool) -> Console:
    """Where progress is shown: standard error, or nowhere."""
    # The file is named because a conversion redirects sys.stderr for a while.
    return Console(file=sys.stderr, quiet=not progress)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which mean little to somebody who asked for text."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
