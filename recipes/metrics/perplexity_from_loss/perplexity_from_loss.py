"""Perplexity from summed losses, as a module for `evaluate.load` beside the recipes: nothing is fetched."""

from __future__ import annotations

import math

import datasets
import evaluate

_DESCRIPTION = "Mean cross entropy over all predicted tokens, and its exponential."
_INPUTS = (
    "predictions (list of float): cross entropy summed over the predicted tokens of each example. "
    "references (list of int): how many tokens of each example were predicted."
)


class PerplexityFromLoss(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        tokens = sum(references)
        loss = math.fsum(predictions) / tokens if tokens else math.nan
        # A diverged run has a loss but no perplexity that a float can hold.
        return {"loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss)}
