"""A question answering task that needs no download: what does a docstring say about a parameter?

The contexts are numpydoc docstrings of libraries that the recipes install anyway, as they stand in the source. The
answer to every question (a parameter's type, its default, what it means) is a span of its context.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

from installed_source import docstrings, opening, source_files

LIBRARIES = ("networkx", "numpy", "pandas", "scipy", "sklearn")
SECTION = re.compile(r"^(?:Other )?Parameters\n-+\n(?P<body>.*?)(?=\n\n\w[\w ]*\n-+\n|\Z)", re.MULTILINE | re.DOTALL)
# A line `name : type, optional, default=value`, and the indented lines below it.
PARAMETER = re.compile(r"^(?P<name>\w+) ?: (?P<type>.+)\n(?P<meaning>(?:[ \t]+\S.*(?:\n|\Z))+)", re.MULTILINE)
TYPE = re.compile(
    r"(?P<type>.+?)(?:,? *\(?optional\b[,)]?)?(?:,? *\(?default(?: *[=:] *| +)(?P<default>[^()]+|[^()]*\([^()]*\))\)?)?"
)
SENTENCE = re.compile(r"\s*(?P<meaning>[A-Z`'\"].+?)\.(?:\s|\Z)", re.DOTALL)

MIN_CHARACTERS, MAX_CHARACTERS = 200, 1200
MAX_ANSWER = 120
MAX_PER_FILE = 12
TEST_FILES = 0.25


# What is asked -> the question.
QUESTIONS = {
    "type": "What type is {}?",
    "default": "What is the default of {}?",
    "meaning": "What does {} mean?",
}


def questions(docstring: str) -> Iterator[tuple[str, str, int, str]]:
    """What is asked, of which parameter, and first character and text of the answer, for all that a docstring tells."""
    for section in SECTION.finditer(docstring):
        parameters = list(PARAMETER.finditer(docstring, *section.span("body")))
        # With a single parameter there is nothing to tell apart.
        for found in parameters if len(parameters) > 1 else ():
            name, start = found["name"], found.start("type")
            line = TYPE.fullmatch(found["type"].rstrip())
            if line and not re.search("default|optional", line["type"]):
                yield "type", name, start, line["type"]
                if line["default"]:
                    yield "default", name, start + line.start("default"), line["default"]
            if sentence := SENTENCE.match(found["meaning"]):
                yield "meaning", name, found.start("meaning") + sentence.start("meaning"), sentence["meaning"]


def _collect(files: list[Path], limit: int, seen: set[str], shuffle: random.Random) -> list[dict]:
    rows: list[dict] = []
    for file in files:
        before = len(rows)
        for _, context in docstrings(file):
            if not MIN_CHARACTERS <= len(context) <= MAX_CHARACTERS or opening(context) in seen:
                continue
            asked = [found for found in questions(context) if len(found[-1]) <= MAX_ANSWER]
            # One question of a kind: most parameters have a type, and few docstrings tell a default.
            shuffle.shuffle(asked)
            one_of_a_kind = {kind: found for kind, *found in asked}
            for kind, (name, start, text) in sorted(one_of_a_kind.items()):
                seen.add(opening(context))
                answers = {"text": [text], "answer_start": [start]}
                question = QUESTIONS[kind].format(name)
                rows.append({"question": question, "context": context, "answers": answers, "file": file.as_posix()})
            if len(rows) >= limit:
                return rows[:limit]
            if len(rows) - before >= MAX_PER_FILE:
                break
    return rows


def docstring_questions_task(train_per_library: int = 480, test_per_library: int = 80, seed: int = 0) -> DatasetDict:
    """Build the task, in SQuAD's form: columns `question`, `context`, `answers`, and `file`.

    The same library versions and the same seed give the same questions in the same order. A file lends its docstrings
    to one split only, and no docstring is used twice.
    """
    shuffle = random.Random(seed)
    seen: set[str] = set()
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for library in LIBRARIES:
        _, files = source_files(library)
        shuffle.shuffle(files)
        border = round(len(files) * TEST_FILES)
        rows["test"] += _collect(files[:border], test_per_library, seen, shuffle)
        rows["train"] += _collect(files[border:], train_per_library, seen, shuffle)
    for of_split in rows.values():
        shuffle.shuffle(of_split)
    return DatasetDict({split: Dataset.from_list(of_split) for split, of_split in rows.items()})
