"""Imports point one way: from the top of the list of folders in CONTRIBUTING.md to its bottom, in no circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_backrazor

PACKAGE = Path(hf_backrazor.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
FACADE = PACKAGE.name

Graph = Mapping[str, set[str]]


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Module -> those of the package that it imports: when it is imported, in a function, or for types alone."""
    paths = {_module(path): path for path in PACKAGE.rglob("*.py")}
    return {name: set(_imports(name, path, paths)) - {name} for name, path in paths.items()}


def test_no_circle(graph: Graph) -> None:
    # The package itself imports what it exports when somebody asks for it; others read its version.
    assert not _circle({name: imported - {FACADE} for name, imported in graph.items() if name != FACADE})


def test_importing_the_package_imports_nothing_of_it() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]


def test_folders_point_one_way(graph: Graph) -> None:
    between: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if name != FACADE:
            between.setdefault(_part(name), set()).update(_part(other) for other in imported - {FACADE})
    assert not _circle({part: others - {part} for part, others in between.items()})


def test_the_list_is_in_order(graph: Graph) -> None:
    """No file imports one of a line of CONTRIBUTING.md above its own, and each file is in some line."""
    lines = re.findall(r"^\| (`.+?) \|", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE)
    place = {_listed(name): i for i, line in enumerate(lines) for name in re.findall(r"`([\w/.]+)`", line)}
    parts = {name: _part(name) for name in graph if name != FACADE}
    assert not set(parts.values()) - set(place), "these are in no line"
    upward = [
        f"{name} imports {other}"
        for name, part in parts.items()
        for other in graph[name] - {FACADE}
        if place[parts[other]] < place[part]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from .. import config", {"hf_backrazor.config"}),
        ("from ..config import PRESETS", {"hf_backrazor.config"}),
        ("from . import OPERATORS", {"hf_backrazor.modules"}),
        ("def f():\n    from .base import describe", {"hf_backrazor.modules.base"}),
        ("import hf_backrazor.packing.bits", {"hf_backrazor.packing", "hf_backrazor.packing.bits"}),
        ("import torch", set()),
    ],
)
def test_imports_are_found(tmp_path: Path, code: str, found: set[str]) -> None:
    path = tmp_path / "linear.py"
    path.write_text(code, encoding="utf-8")
    known = {_module(path) for path in PACKAGE.rglob("*.py")}
    assert set(_imports("hf_backrazor.modules.linear", path, known)) == found


def test_circles_are_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(name: str) -> str:
    """The folder or the file right below the package that a module lies in."""
    return name.split(".")[1]


def _listed(name: str) -> str:
    """The same, of a folder or file as CONTRIBUTING.md names it."""
    return name.removeprefix("hf_backrazor/").rstrip("/").removesuffix(".py")


def _imports(name: str, path: Path, known: Collection[str]) -> Iterator[str]:
    """The modules among those `known` that this file imports, and the packages that are imported on the way to them."""
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")[: len(folder.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            submodules = [f"{source}.{each.name}" for each in node.names]
            targets = [each if each in known else source for each in submodules]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            on_the_way = (".".join(parts[:end]) for end in range(1, len(parts)))
            # Those that this module lies in itself are being imported already.
            yield from (each for each in on_the_way if each in known and not name.startswith(f"{each}."))
            if target in known:
                yield target


def _circle(graph: Graph) -> list[str]:
    """Modules that import each other, the first one again at the end; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []
