"""Load the data set a user names, and say in one line what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.config import PIL_AVAILABLE

from one_line_errors import stop, stop_on_error

TEXT = ("string", "large_string")
BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
HELD_OUT = 0.1
# Fixed, so that runs with different --seed are scored on the same examples.
SPLIT_SEED = 0


def _load(name: str, config: str | None) -> Dataset | DatasetDict:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return load_from_disk(str(path))
        return load_dataset(str(path), config)
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"a file must end in one of {', '.join(BUILDERS)}")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), **options)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise FileNotFoundError("no such file or folder")
    return load_dataset(name, config)


def load_splits(
    name: str, config: str | None = None, train_split: str = "train", eval_split: str | None = None
) -> tuple[Dataset, Dataset]:
    """The training and the evaluation split of a Hub dataset or of local data."""
    with stop_on_error(f"could not load the dataset {name!r}"):
        loaded = _load(name, config)
    splits = loaded if isinstance(loaded, dict) else {train_split: loaded}
    for wanted in (train_split, eval_split):
        if wanted is not None and wanted not in splits:
            stop(f"the dataset {name!r} has no split {wanted!r}, only {', '.join(map(str, splits))}")
    train = splits[train_split]
    evaluation = next((splits[split] for split in (eval_split, "validation", "test") if split in splits), None)
    if evaluation is None:
        with stop_on_error(f"could not hold out a tenth of the dataset {name!r} for evaluation"):
            halves = train.train_test_split(HELD_OUT, seed=SPLIT_SEED)
        train, evaluation = halves["train"], halves["test"]
    for split, rows in (("training", train), ("evaluation", evaluation)):
        if len(rows) == 0:
            stop(f"the {split} split of the dataset {name!r} has no rows")
    return train, evaluation


def at_most(rows: Dataset, limit: int | None) -> Dataset:
    """The rows, or if there are more than the limit, that many of them, the same ones every time."""
    if limit is None or len(rows) <= limit:
        return rows
    # Drawn and not cut off: rows are often sorted by class.
    return rows.shuffle(seed=SPLIT_SEED).select(range(limit))


def require_column(train: Dataset, evaluation: Dataset, column: str, argument: str) -> None:
    """Stop unless both splits have the column, naming the argument that chooses it."""
    for rows in (train, evaluation):
        if column not in rows.column_names:
            stop(f"the dataset has no column {column!r}, only {', '.join(rows.column_names)}: see {argument}")


def require_text(train: Dataset, column: str, argument: str) -> None:
    """Stop unless the column holds text."""
    feature = train.features[column]
    if not isinstance(feature, Value) or feature.dtype not in TEXT:
        stop(f"the column {column!r} holds {feature}, not text: choose with {argument}")


def require_images(train: Dataset, column: str, argument: str) -> int:
    """Stop unless the column holds images, as files or as arrays of bytes, and return their channels."""
    if isinstance(train.features[column], Image):
        if not PIL_AVAILABLE:
            stop(f"the column {column!r} holds image files, which take Pillow to read: pip install pillow")
        return 3
    try:
        first = np.array(train[0][column])
    except ValueError:
        first = np.array(None)
    channels = 1 if first.ndim == 2 else first.shape[-1] if first.ndim == 3 else 0
    if channels not in (1, 3) or first.dtype.kind not in "iu" or first.min() < 0 or first.max() > 255:
        stop(f"the column {column!r} holds neither images nor arrays of bytes: choose with {argument}")
    return channels


def with_class_labels(train: Dataset, evaluation: Dataset, column: str) -> tuple[Dataset, Dataset, list[str]]:
    """Make the label column count classes from 0, the same in both splits, and return the classes' names."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        names, values = feature.names, set(range(len(feature.names)))
    elif isinstance(feature, Value) and ("int" in feature.dtype or feature.dtype in (*TEXT, "bool")):
        values = set(train.unique(column))
        if None in values:
            stop(f"the label column {column!r} has rows without a value")
        names = [str(value) for value in sorted(values)]
    else:
        stop(f"the label column {column!r} holds {feature}, not classes: choose with --label_column")
    if ClassLabel in (type(feature), type(evaluation.features[column])) and evaluation.features[column] != feature:
        stop(f"the label column {column!r} has other classes in the evaluation split than in training")
    if len(names) < 2:
        stop(f"the label column {column!r} has fewer than two classes")
    unknown = [value for rows in (train, evaluation) for value in rows.unique(column) if value not in values]
    if unknown:
        # Test splits of benchmarks often hide their labels behind -1.
        stop(f"the label column {column!r} holds {unknown[0]!r}, which is no class of the training split")
    if not isinstance(feature, ClassLabel):
        classes = ClassLabel(names=names)
        position = {value: index for index, value in enumerate(sorted(values))}
        train, evaluation = (
            rows.map(
                lambda value: {column: position[value]},
                input_columns=[column],
                features=type(rows.features)({**rows.features, column: classes}),
            )
            for rows in (train, evaluation)
        )
    return train, evaluation, list(names)
