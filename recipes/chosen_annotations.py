"""Tagged words and answers in the data set a user names, and in one line what is wrong with them."""

from __future__ import annotations

from datasets import ClassLabel, Dataset, LargeList, List, Value

from chosen_dataset import TEXT
from one_line_errors import stop


def require_words(train: Dataset, column: str, argument: str) -> None:
    """Stop unless the column holds a list of words in each row."""
    feature = _inner(train, column)
    if not isinstance(feature, Value) or feature.dtype not in TEXT:
        stop(f"the column {column!r} holds {train.features[column]}, not lists of words: choose with {argument}")


def with_tag_numbers(train: Dataset, evaluation: Dataset, words: str, tags: str) -> tuple[Dataset, Dataset, list[str]]:
    """Make the tags count from 0, the same in both splits, and return their names.

    Args:
        train: training split.
        evaluation: evaluation split.
        words: the column with a list of words in each row.
        tags: the column with as many tags.
    """
    feature = _inner(train, tags)
    if isinstance(feature, ClassLabel):
        if _inner(evaluation, tags) != feature:
            stop(f"the column {tags!r} has other tags in the evaluation split than in training")
        values = range(len(feature.names))
        names = feature.names
    elif isinstance(feature, Value) and ("int" in feature.dtype or feature.dtype in TEXT):
        values = sorted({tag for of_row in train[tags] for tag in of_row})
        names = [str(value) for value in values]
    else:
        stop(f"the column {tags!r} holds {train.features[tags]}, not lists of tags: choose with --label_column")
    number = {value: index for index, value in enumerate(values)}
    for split, rows in (("training", train), ("evaluation", evaluation)):
        for index, row in enumerate(rows.select_columns([words, tags])):
            if len(row[words]) != len(row[tags]):
                stop(f"row {index} of the {split} split has {len(row[words])} words and {len(row[tags])} tags")
            for tag in row[tags]:
                if tag not in number:
                    stop(f"row {index} of the {split} split is tagged {tag!r}, which no row of the training split is")
    if not isinstance(feature, ClassLabel):
        numbered = List(ClassLabel(names=names))
        train, evaluation = (
            rows.map(
                lambda of_row: {tags: [number[tag] for tag in of_row]},
                input_columns=[tags],
                features=type(rows.features)({**rows.features, tags: numbered}),
            )
            for rows in (train, evaluation)
        )
    return train, evaluation, list(names)


def require_answers(rows: Dataset, context: str, answers: str) -> None:
    """Stop unless the column holds answers as SQuAD does: `text` and `answer_start`, lists, of spans of the context."""
    for index, row in enumerate(rows.select_columns([context, answers])):
        found = row[answers]
        if not isinstance(found, dict) or not {"text", "answer_start"} <= found.keys():
            stop(f"the column {answers!r} holds no text and answer_start, as SQuAD does: choose with --answers_column")
        for text, start in zip(found["text"], found["answer_start"], strict=True):
            if row[context][start : start + len(text)] != text:
                stop(f"row {index}: the answer {text!r} does not stand at character {start} of the context")


def _inner(rows: Dataset, column: str) -> object:
    feature = rows.features[column]
    return feature.feature if isinstance(feature, (List, LargeList)) else None
