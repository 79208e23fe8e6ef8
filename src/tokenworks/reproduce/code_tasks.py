"""Python code to be completed: short functions with tests, made for this project, and the standard library's own.

    tasks("test")                  # prompt, a reference solution, tests
    library_functions("test")      # of modules that no "calibration" function comes from
    library_lines(functions)       # a place in each, and how the line goes on

The standard library differs a little between versions of Python, and so do these functions.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from tokenworks.core.sandbox import Outcome, run_tests

SPLITS = ("calibration", "test")
LINES = range(8, 41)
"""How long a function of the library may be, its docstring included."""

SECONDS, MEGABYTES = 5.0, 256
"""Limits for the tests of one function, which takes milliseconds; the rest is for a busy machine."""


@dataclass(frozen=True)
class Task:
    """A function to write.

    Attributes:
        id: its name.
        split: one of `SPLITS`.
        prompt: signature and docstring, with an example. It ends with the docstring's quotes: a prompt that ends
            in a newline parts the tokens where the model never saw them parted, and it writes nothing.
        solution: a body that passes, beginning with the newline.
        tests: assertions.
    """

    id: str
    split: str
    prompt: str
    solution: str
    tests: str

    def judge(self, body: str) -> Outcome:
        """Run the tests against `body`, a newline and an indented block, in the sandbox."""
        return run_tests(self.prompt + body, self.tests, SECONDS, MEGABYTES)


@dataclass(frozen=True)
class LibraryFunction:
    """A function of the standard library: its name, everything down to its docstring, and the rest."""

    id: str
    prompt: str
    body: str


@dataclass(frozen=True)
class LibraryLine:
    """A place in a function: all before it, and the rest of its line."""

    id: str
    prompt: str
    rest: str


def tasks(split: str) -> list[Task]:
    """The tasks of one of `SPLITS`."""
    lines = files("tokenworks.reproduce").joinpath("code_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    return [task for task in (Task(**json.loads(line)) for line in lines) if task.split == split]


def library_functions(split: str, limit: int) -> list[LibraryFunction]:
    """At most `limit` documented functions of modest length, drawn over all modules of one of `SPLITS`."""
    found = [function for chosen, function in _library() if chosen == split]
    return random.Random(0).sample(found, min(limit, len(found)))


def library_lines(functions: Iterable[LibraryFunction]) -> list[LibraryLine]:
    """One place in each function, where there is one: at a space inside a line of code."""
    found = []
    for function in functions:
        chance = random.Random(zlib.crc32(function.id.encode()))
        lines = function.body.split("\n")
        places = [
            (number, place)
            for number, line in enumerate(lines)
            if not line.lstrip().startswith(("#", '"', "'"))
            for place in range(len(line) - 4)
            # Before the space, as tokens begin with one.
            if line[place] == " " and line[:place].strip() and line[place + 1] != " "
        ]
        if places:
            number, place = chance.choice(places)
            before = "".join(f"{line}\n" for line in lines[:number]) + lines[number][:place]
            found.append(LibraryLine(function.id, function.prompt + before, lines[number][place:]))
    return found


@lru_cache(maxsize=1)
def _library() -> list[tuple[str, LibraryFunction]]:
    """Every function that fits, with its module's split."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if any(part in name for part in ("site-packages", "dist-packages", "test", "lib2to3", "idlelib", "pydoc")):
            continue
        split = SPLITS[zlib.crc32(name.encode()) % 2]
        found += [(split, function) for function in _functions(path, name)]
    return found


def _functions(path: Path, module: str) -> Iterator[LibraryFunction]:
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return  # some files are there to be wrong
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        end = node.body[0].end_lineno
        assert end is not None
        assert node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 in LINES and node.body[1].lineno > end:
            # Not `dedent`: a string's own lines may begin further to the left.
            margin = " " * node.col_offset
            whole = [each.removeprefix(margin) for each in lines[node.lineno - 1 : node.end_lineno]]
            cut = end - node.lineno + 1
            body = "".join(f"\n{line}" for line in whole[cut:])
            yield LibraryFunction(f"{module}:{node.name}:{node.lineno}", "\n".join(whole[:cut]), f"{body}\n")
