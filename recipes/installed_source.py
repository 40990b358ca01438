"""The source of installed libraries, parsed and never imported: what the offline tasks are made from."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from one_line_errors import stop

# Tests repeat the docstrings they test, and vendored code belongs to another library.
SKIPPED_FOLDERS = frozenset({"tests", "testing", "test_utils", "externals", "_vendor", "vendored", "array_api_compat"})

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def source_files(library: str) -> tuple[Path, list[Path]]:
    """The folder of a library, and its Python files in an order that does not depend on the file system."""
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        stop(f"the default data are made from the source of {library}: pip install 'hf_backrazor[recipes]'")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [file for file in root.rglob("*.py") if not SKIPPED_FOLDERS & set(file.relative_to(root).parts)]
    return root, sorted(files, key=lambda file: file.relative_to(root).as_posix())


def docstrings(file: Path) -> Iterator[tuple[Documented, str]]:
    """Every module, class and function of a file that has a docstring, with the docstring, indentation removed."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's strings are theirs to warn about.
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
            yield node, docstring


def opening(text: str) -> str:
    """The first words of a text. Docstrings copied from class to class differ in one name or number; these do not."""
    words = "".join(letter if letter.isascii() and letter.isalpha() else " " for letter in text.lower()).split()
    return " ".join(word for word in words if len(word) > 1)[:80]
