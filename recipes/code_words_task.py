"""A token classification task that needs no download: which words of a docstring are code?

The texts are paragraphs of docstrings of libraries that the recipes install anyway. Their authors put code in quotes
(``None``, `axis`, :class:`Series`). The quotes are taken away, and the tags say where they were and what stood in them.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from installed_source import Documented, docstrings, opening, source_files

# Libraries that quote in reStructuredText and not in Markdown.
LIBRARIES = ("networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch")
# A name of an argument of the documented function, a literal of Python (None, 0.5, "auto"), any other code.
KINDS = ("ARGUMENT", "VALUE", "CODE")
TAGS = ["O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI")]

QUOTED = re.compile(
    r":(?:py:)?(?P<role>[a-z]+):`[~!]?(?P<target>[^`<]+?)(?:\s*<[^`]*>)?`"
    r"|``(?P<literal>[^`]+)``"
    r"|(?<![`\w:])`(?P<name>[^`]+)`(?![`\w])(?P<link>_?)"
)
CODE_ROLES = frozenset({"attr", "class", "const", "data", "exc", "func", "meth", "mod", "obj"})
WORD = re.compile(r"\w+|[^\w\s]")
# Examples, directives, tables, titles and formulas are not running text; nor is the line `name : type`.
NOT_PROSE = re.compile(r">>>|\.\. |:math:|\||^\s*[-=~^]{3,}\s*$|\\", re.MULTILINE)
PARAMETER_LINE = re.compile(r"^\s*\*{0,2}\w+(?:, \*{0,2}\w+)* ?:(?: .*)?$\n?", re.MULTILINE)

MIN_WORDS, MAX_WORDS = 12, 80
MAX_PER_FILE = 12
TEST_FILES = 0.25


def _arguments(node: Documented) -> set[str]:
    if isinstance(node, ast.ClassDef):
        inits = (child for child in node.body if getattr(child, "name", "") == "__init__")
        node = next(inits, node)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    found = node.args
    several = [argument for argument in (found.vararg, found.kwarg) if argument]
    return {argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs, *several)}


def _kind(quoted: re.Match[str], arguments: set[str]) -> str | None:
    if quoted["link"] or (quoted["role"] and quoted["role"] not in CODE_ROLES):
        return None
    text = (quoted["literal"] or quoted["name"] or "").strip()
    if text in arguments:
        return "ARGUMENT"
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return "CODE"
    return "VALUE"


def tagged_words(paragraph: str, arguments: set[str]) -> tuple[list[str], list[str]]:
    """The words of a paragraph without quotes, and a tag for each.

    Args:
        paragraph: text in reStructuredText.
        arguments: names of the arguments of the function that it documents.
    """
    words: list[str] = []
    tags: list[str] = []

    def add(text: str, kind: str | None) -> None:
        found = WORD.findall(text)
        words.extend(found)
        tags.extend("O" if kind is None else f"{'I' if index else 'B'}-{kind}" for index in range(len(found)))

    end = 0
    for quoted in QUOTED.finditer(paragraph):
        add(paragraph[end : quoted.start()], None)
        add(quoted["target"] or quoted["literal"] or quoted["name"], _kind(quoted, arguments))
        end = quoted.end()
    add(paragraph[end:], None)
    return words, tags


def _is_consistent(words: list[str], tags: list[str]) -> bool:
    # Authors forget quotes. Where a word has them once and not another time, who knows what is right?
    code = {word for word, tag in zip(words, tags, strict=True) if tag != "O" and len(word) > 1}
    return bool(code) and not any(word in code for word, tag in zip(words, tags, strict=True) if tag == "O")


def _paragraphs(file: Path) -> Iterator[tuple[list[str], list[str]]]:
    for node, docstring in docstrings(file):
        arguments = _arguments(node)
        for paragraph in re.split(r"\n\s*\n", docstring):
            if not NOT_PROSE.search(paragraph):
                words, tags = tagged_words(PARAMETER_LINE.sub("", paragraph), arguments)
                if "`" not in words and MIN_WORDS <= len(words) <= MAX_WORDS and _is_consistent(words, tags):
                    yield words, tags


def _collect(root: Path, files: list[Path], limit: int, seen: set[str]) -> list[dict]:
    """Up to `limit` rows, none beginning like a text in `seen`."""
    rows: list[dict] = []
    for file in files:
        from_this_file = 0
        for words, tags in _paragraphs(file):
            first_words = opening(" ".join(words))
            if first_words in seen:
                continue
            seen.add(first_words)
            rows.append({"tokens": words, "tags": tags, "file": file.relative_to(root.parent).as_posix()})
            from_this_file += 1
            if len(rows) == limit:
                return rows
            if from_this_file == MAX_PER_FILE:
                break
    return rows


def code_words_task(train_per_library: int = 700, test_per_library: int = 90, seed: int = 0) -> DatasetDict:
    """Build the task: columns `tokens`, `tags` and `file`.

    The same library versions and the same seed give the same texts in the same order. A file lends its paragraphs to
    one split only, and no paragraph is used twice.
    """
    shuffle = random.Random(seed)
    seen: set[str] = set()
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for library in LIBRARIES:
        root, files = source_files(library)
        shuffle.shuffle(files)
        border = round(len(files) * TEST_FILES)
        rows["test"] += _collect(root, files[:border], test_per_library, seen)
        rows["train"] += _collect(root, files[border:], train_per_library, seen)
    features = Features(
        {"tokens": List(Value("string")), "tags": List(ClassLabel(names=TAGS)), "file": Value("string")}
    )
    for of_split in rows.values():
        shuffle.shuffle(of_split)
    return DatasetDict({split: Dataset.from_list(of_split, features=features) for split, of_split in rows.items()})
