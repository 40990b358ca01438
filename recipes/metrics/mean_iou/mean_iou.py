"""Mean intersection over union, as a module for `evaluate.load` beside the recipes: nothing is fetched."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "Intersection over union of the pixels that a class was predicted for and those that are its own: for each class "
    "(None if there are neither) and the mean over classes; and the fraction of pixels with the right class."
)
_INPUTS = (
    "predictions (list of int): predicted classes. references (list of int): true classes. "
    "pixels (list of int): how many pixels have this prediction and this reference; in all, these may be many lists. "
    "num_labels (int): how many classes there are. "
    "ignore_index (int): the reference of pixels that count for nothing."
)


class MeanIoU(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # Pixels would fill the memory: what is added are counts, of which a batch has at most as many as pairs of
        # classes.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "pixels")}
            ),
        )

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        pixels: list[int],
        num_labels: int,
        ignore_index: int | None = None,
    ) -> dict[str, float | list[float | None]]:
        found, true, times = (np.array(column, dtype=np.int64) for column in (predictions, references, pixels))
        counted = true != ignore_index
        confusion = np.zeros((num_labels, num_labels), dtype=np.int64)  # true classes by predicted ones
        np.add.at(confusion, (true[counted], found[counted]), times[counted])
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        iou = [int(both) / int(either) if either else None for both, either in zip(right, union, strict=True)]
        occurring = [value for value in iou if value is not None]
        return {
            "mean_iou": sum(occurring) / len(occurring) if occurring else math.nan,
            "overall_accuracy": int(right.sum()) / int(confusion.sum()) if occurring else math.nan,
            "per_class_iou": iou,
        }
