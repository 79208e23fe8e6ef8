"""The house rules that a machine can check: imports point down, modules say what they are, one version."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import tokenworks

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))

FAMILIES = ("tokenize", "train", "align", "compress", "compute", "decode", "reason", "prompt", "synth")
LAYERS = (("core",), FAMILIES, ("testing",), ("reproduce",), ("report", "serve"), ("cli",), ("__main__",))
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of tokenworks that a module imports anywhere, inside functions and for typing included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "house style is absolute imports"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    split = [name.split(".") for name in names]
    return {
        name[1] for name in split if name[0] == "tokenworks" and len(name) > 1 and not name[1].startswith("__")
    }


def upward_imports(part: str, source: str) -> list[str]:
    """What a module of `part` imports but may not: anything beside or above it."""
    return sorted(
        other for other in imported_parts(ast.parse(source)) if other != part and not RANK[other] < RANK[part]
    )


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "tokenworks").with_suffix("").parts[0]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in RANK, f"{part_of(path)} has no place in the order of layers"
    assert upward_imports(part_of(path), path.read_text()) == []


def test_the_package_itself_imports_nothing_from_its_parts() -> None:
    assert imported_parts(ast.parse((ROOT / "src/tokenworks/__init__.py").read_text())) == set()


@pytest.mark.parametrize(
    ("part", "source", "upward"),
    [
        ("core", "from tokenworks.decode.loop import decode", ["decode"]),
        ("core", "from tokenworks import decode", ["decode"]),
        ("core", "def late():\n    import tokenworks.reproduce.result", ["reproduce"]),
        ("decode", "from tokenworks.align import tdpo", ["align"]),
        ("serve", "import tokenworks.report", ["report"]),
        ("decode", "from tokenworks.decode.tree import a\nfrom tokenworks.core.errors import b\nimport torch", []),
        ("cli", "from tokenworks import __version__\nfrom tokenworks.report import page", []),
    ],
)
def test_the_rule_catches_each_way_of_importing(part: str, source: str, upward: list[str]) -> None:
    assert upward_imports(part, source) == upward


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    # An __init__.py that is empty has nothing to say.
    assert not tree.body or ast.get_docstring(tree)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tokenworks.__version__
