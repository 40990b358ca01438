"""Accuracy, as a module for `evaluate.load` beside the recipes: nothing is fetched."""

from __future__ import annotations

import datasets
import evaluate

_DESCRIPTION = "The fraction of predictions that equal their reference."
_INPUTS = "predictions (list of int): predicted classes. references (list of int): true classes."


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(int(prediction == reference) for prediction, reference in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}
