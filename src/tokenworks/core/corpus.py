"""Text that every Python carries with it, and small tokenizers: what small models are trained on.

Python's own documentation: the language reference that `help()` shows, and the docstrings of the standard
library, read from its source files without importing them. About 1.7 MB of English prose with code in it. It
differs a little between versions of Python, so a model kept with the project says which one it saw.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokenworks.core.errors import InputError

SPLITS = ("train", "test")
HELD_OUT = 20
"""One document in so many is kept for testing, chosen by a checksum of its name."""

SHORTEST = 200
"""Shorter docstrings, in characters, say too little."""


def python_docs(split: str = "train") -> list[str]:
    """The documents of one split, in a fixed order: topics of the language reference, then modules.

    A module is one document, so that no docstring is in one split while its neighbours are in the other.

    Raises:
        InputError: no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split: there is no {split!r}; choose one of {', '.join(SPLITS)}")
    held = [(zlib.crc32(name.encode()) % HELD_OUT == 0, text) for name, text in _documents()]
    return [text for is_held, text in held if is_held == (split == "test")]


@lru_cache(maxsize=1)
def _documents() -> list[tuple[str, str]]:
    found = [(f"topic {name}", text.strip()) for name, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if "site-packages" in name or "dist-packages" in name or "test" in name or "lib2to3" in name:
            continue
        text = "\n\n".join(_docstrings(path))
        if len(text) >= SHORTEST:
            found.append((name, text))
    return found


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # some files are there to be wrong
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield inspect.cleandoc(text)


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, end_id: int) -> Tensor:
    """All texts in a row, `end_id` after each: int64 [n]."""
    return torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], end_id]])


def windows(stream: Tensor, rows: int, length: int, random: torch.Generator) -> Tensor:
    """So many stretches of a stream [n], drawn at random: int64 [rows, length]."""
    first = torch.randint(len(stream) - length, (rows, 1), generator=random)
    return stream[first + torch.arange(length)]


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: Iterable[str] = (), single_digits: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; its first ids are `special`, and every text survives a round trip.

    Args:
        single_digits: no token holds two digits, nor a digit and anything else; for models that calculate.

    Raises:
        InputError: a vocabulary that cannot hold the 256 bytes and the special tokens.
    """
    names = list(special)
    if vocab_size < 256 + len(names):
        raise InputError(f"vocab_size: {vocab_size} cannot hold 256 bytes and {len(names)} special tokens")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if single_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    else:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
