"""Images annotated pixel by pixel in the data set a user names, and in one line what is wrong with them."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List

from class_maps import IGNORED, class_map
from one_line_errors import stop, stop_on_error


def require_class_maps(processor: Any, name: str) -> None:
    """Stop unless the image processor of the model `name` takes annotations, and gives all images one size."""
    if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
        stop(f"--model {name}: its image processor, {type(processor).__name__}, takes no annotations of pixels")
    resized = processor.do_resize and "height" in processor.size and not getattr(processor, "keep_aspect_ratio", False)
    if not resized and not getattr(processor, "do_center_crop", False):
        stop(f"--model {name}: its image processor leaves images of a batch at several sizes: choose --image_size")


def class_names(
    train: Dataset,
    evaluation: Dataset,
    images: str,
    annotations: str,
    *,
    labels_file: str | None,
    known: list[str] | None,
    reduced: bool,
) -> list[str]:
    """Find what the annotated classes are called, and stop at a row that cannot be trained or scored on.

    Args:
        train: training split.
        evaluation: evaluation split.
        images: the column of images.
        annotations: the column of class numbers, one for each pixel of the image.
        labels_file: json that names the model's labels in their order, if the user has one.
        known: names of the annotations' numbers, where neither that file nor the column itself has names.
        reduced: whether the model's label is the annotation's number less 1, and 0 counts for nothing; image
            processors call it `do_reduce_labels`.

    Returns:
        The names of the model's labels; without any, the numbers that annotations hold.
    """
    first = 1 if reduced else 0
    numbered = _names_in_column(train, evaluation, annotations) or known
    if labels_file is not None:
        names = _names_in_file(labels_file)
    elif numbered is not None:
        names = numbered[first:]
    else:
        names = None
    greatest = 0 if names is None else len(names) - 1 + first
    for split, rows in (("training", train), ("evaluation", evaluation)):
        for index, row in enumerate(rows.select_columns([images, annotations])):
            where = f"row {index} of the {split} split"
            highest = _highest_number(row[images], row[annotations], where)
            if names is not None and highest > greatest:
                stop(f"{where} is annotated with class {highest}, and the {len(names)} labels end at {greatest}")
            greatest = max(greatest, highest)
    if names is None:
        names = [str(number) for number in range(first, greatest + 1)]
    if len(names) < 2:
        stop(f"the column {annotations!r} has fewer than two classes ({IGNORED} counts for nothing)")
    return names


def _names_in_column(train: Dataset, evaluation: Dataset, annotations: str) -> list[str] | None:
    feature, other = (_inner(rows.features[annotations]) for rows in (train, evaluation))
    if ClassLabel in (type(feature), type(other)) and other != feature:
        stop(f"the column {annotations!r} has other classes in the evaluation split than in training")
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _inner(feature: object) -> object:
    return _inner(feature.feature) if isinstance(feature, (List, LargeList)) else feature


def _names_in_file(path: str) -> list[str]:
    with stop_on_error(f"could not read --labels {path}"), open(path, encoding="utf-8") as file:
        content = json.load(file)
    if isinstance(content, dict) and content.keys() == {str(number) for number in range(len(content))}:
        content = [content[str(number)] for number in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        stop(f"--labels {path} holds neither a list of names nor names by number from 0")
    return content


def _highest_number(image: Any, annotation: Any, where: str) -> int:
    """The highest class of an annotation; -1 if all of its pixels count for nothing."""
    try:
        numbers = np.array(annotation).squeeze()
    except ValueError:
        numbers = np.array(None)
    if numbers.ndim != 2 or numbers.dtype.kind not in "iub" or numbers.min() < -1 or numbers.max() > IGNORED:
        stop(f"{where}: its annotation is no map of class numbers from 0 to {IGNORED}: choose with --label_column")
    height, width = (image.height, image.width) if hasattr(image, "convert") else np.shape(image)[:2]
    if (height, width) != numbers.shape:
        annotated = " x ".join(map(str, numbers.shape))
        stop(f"{where} has an image of {height} x {width} pixels and an annotation of {annotated}")
    numbers = class_map(numbers)
    return int(numbers[numbers != IGNORED].astype(int).max(initial=-1))
