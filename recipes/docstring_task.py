"""A text classification task that needs no download: which library does this docstring come from?

The texts are the docstrings of libraries that the recipes install anyway. Their source is parsed with `ast`,
never imported. Every library's name is masked in every text: style and subject have to give it away.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from installed_source import docstrings, source_files

# Each library, with every other name it goes by: distribution, import alias, spelling in prose.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "huggingface_hub": ("huggingface", "hugging face", "hf"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "scipy": ("sp",),
    "sklearn": ("scikit",),
    "sympy": (),
    "torch": (),
    "transformers": (),
}
MASK = "[MASK]"

MIN_CHARACTERS = 160
MAX_CHARACTERS = 1200
MAX_PER_FILE = 12
TEST_FILES = 0.25


def _name_pattern() -> re.Pattern[str]:
    names = [name for library, others in LIBRARIES.items() for name in (library, *others)]
    # A long name is masked with all of the dotted or underscored word around it (`torch.nn.Linear`,
    # `is_torch_tensor`), a two-letter alias only as a word with what hangs on it (`np.array`), or half of
    # `input` would go too.
    long = "|".join(re.escape(name) for name in names if len(name) > 2)
    short = "|".join(name for name in names if len(name) <= 2)
    return re.compile(rf"[\w.\-]*(?:{long})[\w\-]*(?:\.\w+)*|\b(?:{short})\b(?:\.\w+)*", re.IGNORECASE)


NAMES = _name_pattern()


def mask_names(text: str) -> str:
    """Replace every name of every library, with the dotted path it is part of, by `[MASK]`."""
    return NAMES.sub(MASK, text)


def _collect(root: Path, files: list[Path], limit: int, seen: set[str]) -> list[tuple[str, str]]:
    """Up to `limit` pairs of masked docstring and file, none beginning like a text in `seen`."""
    found: list[tuple[str, str]] = []
    for file in files:
        from_this_file = 0
        for _, docstring in docstrings(file):
            if len(docstring) < MIN_CHARACTERS:
                continue
            text = mask_names(docstring)[:MAX_CHARACTERS]
            # Docstrings copied from class to class differ in one name or number; their first words do not.
            opening = " ".join(re.findall(r"[a-z]{2,}", text.lower())[:12])
            if opening in seen:
                continue
            seen.add(opening)
            found.append((text, file.relative_to(root.parent).as_posix()))
            from_this_file += 1
            if len(found) == limit:
                return found
            if from_this_file == MAX_PER_FILE:
                break
    return found


def docstring_task(train_per_library: int = 270, test_per_library: int = 60, seed: int = 0) -> DatasetDict:
    """Build the task: columns `text`, `label` and `file`, with equally many texts from each library.

    The same library versions and the same seed give the same texts in the same order. A file lends its
    docstrings to one split only, and no text is used twice.
    """
    shuffle = random.Random(seed)
    seen: set[str] = set()
    collected: dict[str, dict[str, list[tuple[str, str]]]] = {"train": {}, "test": {}}
    for library in LIBRARIES:
        root, files = source_files(library)
        shuffle.shuffle(files)
        border = round(len(files) * TEST_FILES)
        collected["test"][library] = _collect(root, files[:border], test_per_library, seen)
        collected["train"][library] = _collect(root, files[border:], train_per_library, seen)

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES)), "file": Value("string")})
    splits = DatasetDict()
    for split, by_library in collected.items():
        # The smallest library sets the size of the others, so chance is one in the number of libraries.
        size = min(len(found) for found in by_library.values())
        rows = [
            {"text": text, "label": library, "file": file}
            for library, found in by_library.items()
            for text, file in found[:size]
        ]
        shuffle.shuffle(rows)
        splits[split] = Dataset.from_list(rows, features=features)
    return splits
