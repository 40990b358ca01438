"""SQuAD's exact match and F1, as a module for `evaluate.load` beside the recipes: nothing is fetched."""

from __future__ import annotations

import re
import string
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = (
    "The fraction of answers that equal a true answer, and the mean F1 of the words that an answer shares with the "
    "true answer it is most like. Case, punctuation and articles do not count."
)
_INPUTS = (
    "predictions (list of str): an answer to each question. "
    "references (list of list of str): the true answers to each question; none where it has no answer."
)


class ExactMatchAndF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        exact, overlap = 0.0, 0.0
        for prediction, answers in zip(predictions, references, strict=True):
            # The only right answer to a question without one is none.
            pairs = [(_words(prediction), _words(answer)) for answer in answers or [""]]
            exact += max(found == true for found, true in pairs)
            overlap += max(_f1(found, true) for found, true in pairs)
        return {"exact_match": exact / len(references), "f1": overlap / len(references)}


def _words(text: str) -> list[str]:
    without_punctuation = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def _f1(found: list[str], true: list[str]) -> float:
    if not found or not true:
        return float(found == true)
    shared = sum((Counter(found) & Counter(true)).values())
    return 2 * shared / (len(found) + len(true))
