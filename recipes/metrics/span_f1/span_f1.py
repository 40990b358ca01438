"""F1 of labelled spans, as a module for `evaluate.load` beside the recipes: nothing is fetched."""

from __future__ import annotations

import datasets
import evaluate
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

_DESCRIPTION = (
    "Precision, recall and F1 of the spans that tags mark out (B-PER I-PER O), as seqeval counts them: a span is right "
    "if its kind and both of its ends are; and the fraction of words with the right tag. Tags without a prefix (NOUN "
    "VERB) make each word but those tagged O a span."
)
_INPUTS = (
    "predictions (list of list of str): a tag for each word of each text. "
    "references (list of list of str): the true tags, as many."
)
_PREFIXES = ("B-", "I-", "E-", "S-")


class SpanF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        both = [[_with_prefix(tag) for tag in tags] for tags in (*references, *predictions)]
        true, found = both[: len(references)], both[len(references) :]
        # A model that has not learned yet finds nothing: 0, without a warning.
        return {
            "f1": float(f1_score(true, found, zero_division=0)),
            "precision": float(precision_score(true, found, zero_division=0)),
            "recall": float(recall_score(true, found, zero_division=0)),
            "accuracy": float(accuracy_score(true, found)),
        }


def _with_prefix(tag: str) -> str:
    return tag if tag == "O" or tag.startswith(_PREFIXES) else f"B-{tag}"
