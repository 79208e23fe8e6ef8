"""The prompts that come with tokenworks, and the user's own files and Hub data sets.

    prompts(kind="code", split="test")        # 14 of the 96 prompts written for this project
    load_prompts("questions.csv")             # the user's own
    load_records("HuggingFaceH4/mt_bench_prompts")

It knows how to read, and what to say when reading fails; what a record means is for the caller to say, apart from
prompts, which nearly every method needs.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from tokenworks.core.errors import InputError

KINDS = ("chat", "code", "maths", "summarising", "translation", "question_answering")
"""The kinds of embedded prompts; 16 of each."""

SPLITS = ("calibration", "test")
"""Calibration prompts (2 of a kind) fit things such as tree shapes; test prompts (14 of a kind) measure them."""

PROMPT_FIELDS = ("prompt", "text", "instruction", "question")
"""Where `load_prompts` looks for the text, in this order."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One user message, without any chat template.

    Attributes:
        id: unique within its source, such as "chat-01".
        kind: one of `KINDS`, or "user" for the user's own.
        text: the message.
        split: one of `SPLITS`.
    """

    id: str
    kind: str
    text: str
    split: str


@dataclass(frozen=True)
class _Bad:
    """A record that cannot be used: where it stands and what is wrong."""

    where: str
    why: str


def prompts(kind: str | None = None, split: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The embedded prompts, taking turns between the kinds, so that the first `limit` are spread evenly over them.

    Args:
        kind: one of `KINDS`; None for all.
        split: one of `SPLITS`; None for both.
        limit: at most so many, at least 1; None for all.

    Raises:
        InputError: `kind` or `split` is unknown, or `limit` is below 1.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind: there is no {kind!r}. Choose one of: {', '.join(KINDS)}.")
    if split is not None and split not in SPLITS:
        raise InputError(f"split: there is no {split!r}. Choose one of: {', '.join(SPLITS)}.")
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is below 1. Leave it out to get every prompt.")
    lines = files("tokenworks.core").joinpath("prompts.jsonl").read_text(encoding="utf-8").splitlines()
    embedded = [Prompt(row["id"], row["kind"], row["prompt"], row["split"]) for row in map(json.loads, lines)]
    by_kind = [
        [prompt for prompt in embedded if prompt.kind == name and split in (None, prompt.split)]
        for name in KINDS
        if kind in (None, name)
    ]
    return [prompt for prompt in chain.from_iterable(zip_longest(*by_kind)) if prompt is not None][:limit]


def load_prompts(source: str | Path) -> list[Prompt]:
    """Prompts from the user's own file or Hub data set (see `load_records`), as kind "user" and split "test".

    The text is the first field of `PROMPT_FIELDS` that holds some; the id is the record's `id` or its number.

    Raises:
        InputError: a record holds no such field, or `source` cannot be read.
    """
    found = []
    for number, record in enumerate(load_records(source), start=1):
        texts = (record.get(name) for name in PROMPT_FIELDS)
        text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
        if text is None:
            raise InputError(
                f"source: record {number} of {source} has no text under {', '.join(PROMPT_FIELDS)}. "
                f"Its keys are: {', '.join(map(str, record)) or 'none'}. Rename the one that holds the prompt."
            )
        name = record.get("id")
        found.append(Prompt(f"user-{number:04d}" if name is None else str(name), "user", text, "test"))
    return found


def load_records(source: str | Path, *, split: str = "train", skip_bad: bool = False) -> list[Record]:
    """Read a file of records, or a data set from the Hugging Face Hub.

    Args:
        source: a file ending in .txt (one record per line, under "text"), .jsonl, .json (a list of objects), .csv
            (with a header, separated by commas) or .parquet, text in UTF-8; otherwise the id of a data set on the
            Hub. Blank lines are ignored.
        split: which split of a Hub data set; a file has only one.
        skip_bad: leave out records that cannot be read, with a warning, instead of raising.

    Returns:
        At least one record, in the order of the source.

    Raises:
        InputError: the source is not there, is empty, is of another format or cannot be read; a record is broken
            (named by its line); the Hub cannot be reached or has no such data set or split.
    """
    path = Path(source).expanduser()
    read = READERS.get(path.suffix.lower())
    if read is None:
        rows: Iterator[Record | _Bad] = iter(_hub(_hub_id(source, path), split))
    elif not path.is_file():
        raise InputError(f"source: there is no file {path}. Check the path; it counts from the current folder.")
    else:
        rows = read(path)
    good: list[Record] = []
    bad: list[_Bad] = []
    for row in rows:
        if not isinstance(row, _Bad):
            good.append(row)
        elif skip_bad:
            bad.append(row)
        else:
            raise InputError(f"source: {source}, {row.where}: {row.why}. Correct it, or pass skip_bad=True.")
    if bad:
        places = ", ".join(row.where for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        message = f"{source}: left out {len(bad)} broken of {len(good) + len(bad)} records ({places})"
        warnings.warn(message, stacklevel=2)
    if not good:
        raise InputError(f"source: {source} holds no {'usable ' if bad else ''}record. At least one is needed.")
    return good


def _text(path: Path) -> str:
    data = _bytes(path)
    try:
        return data.decode("utf-8-sig")  # spreadsheets put a byte-order mark first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"source: {path} is not UTF-8: byte 0x{data[error.start]:02x} on line {line}. Save it as UTF-8."
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"source: cannot read {path} ({error.strerror}). Check its permissions.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines that are not blank; unlike `splitlines`, breaks only where editors count a line."""
    for number, line in enumerate(io.StringIO(_text(path), newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n")


def _read_txt(path: Path) -> Iterator[Record | _Bad]:
    for _, line in _lines(path):
        yield {"text": line}


def _read_jsonl(path: Path) -> Iterator[Record | _Bad]:
    for number, line in _lines(path):
        yield _parse_object(line, f"line {number}")


def _parse_object(line: str, where: str) -> Record | _Bad:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return _Bad(where, f"broken JSON at column {error.colno} ({error.msg})")
    except (ValueError, RecursionError) as error:  # a number of too many digits, or brackets nested too deeply
        return _Bad(where, f"JSON that cannot be read ({error})")
    return _object(value, where)


def _object(value: Any, where: str) -> Record | _Bad:
    return value if isinstance(value, dict) else _Bad(where, f"an object is needed, not {type(value).__name__}")


def _read_json(path: Path) -> Iterator[Record | _Bad]:
    text = _text(path)
    try:
        values = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise InputError(f"source: {path}, line {error.lineno}: broken JSON ({error.msg}). Correct it.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"source: {path}: JSON that cannot be read ({error}). Correct it.") from error
    if not isinstance(values, list):
        raise InputError(f"source: {path} must hold a list of objects. For one object per line, name it .jsonl.")
    for number, value in enumerate(values, start=1):
        yield _object(value, f"item {number}")


def _read_csv(path: Path) -> Iterator[Record | _Bad]:
    table = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = table.fieldnames or []
        if len(set(header)) < len(header):
            raise InputError(f"source: {path}: two columns have the same name in {', '.join(header)}. Rename one.")
        for row in table:
            # DictReader marks a row that is too long by the key None, one that is too short by the value None.
            fits = None not in row and None not in row.values()
            if not fits:
                yield _Bad(f"line {table.line_num}", f"its number of columns is not the header's {len(header)}")
            elif any(value.strip() for value in row.values()):
                yield row
    except csv.Error as error:
        raise InputError(f"source: {path}, line {table.line_num}: broken CSV ({error}). Correct it.") from error


def _read_parquet(path: Path) -> Iterator[Record | _Bad]:
    import pyarrow  # here and not above, as it takes a while to import and few files need it
    import pyarrow.parquet

    data = _bytes(path)
    if not data:
        return
    try:
        yield from pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"source: {path} is not a Parquet file that can be read ({error}).") from error


READERS: dict[str, Callable[[Path], Iterator[Record | _Bad]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""How each kind of file is read, by its suffix in lower case."""


def _hub_id(source: str | Path, path: Path) -> str:
    """`source` as the id of a data set, or an error if it can only be a file."""
    formats = ", ".join(READERS)
    if path.exists():
        raise InputError(f"source: {path} is not one of the formats that can be read: {formats}. Convert it.")
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise InputError(f"source: there is no file {path}, and no data set can have that name. Check the path.")
    # Ids without an owner ("squad") carry no suffix, so this is a file of some other format.
    if "/" not in source and path.suffix:
        raise InputError(f"source: there is no file {path}, and files must end in one of: {formats}.")
    return source


def _hub(name: str, split: str) -> list[Record]:
    import datasets  # here and not above, as it takes a second to import and files do without it

    try:
        return list(datasets.load_dataset(name, split=split))
    except FileNotFoundError as error:  # includes DatasetNotFoundError: missing, private or gated
        raise InputError(
            f"source: there is no file and no open data set {name!r} on the Hugging Face Hub ({_brief(error)}). "
            "Check the name; for a gated or private one, log in with `hf auth login`."
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # An unknown split, a data set of several parts, one that needs a loading script, or broken files.
        raise InputError(f"source: cannot load split {split!r} of {name!r} ({error}). Check `split`.") from error
    except OSError as error:
        raise InputError(
            f"source: the Hugging Face Hub could not be reached for {name!r} ({_brief(error)}). Check the "
            "network, or download the data elsewhere and pass it as a file."
        ) from error


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
