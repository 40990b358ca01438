"""Gradients of the default recipe's model and batch: no group of parameters is left behind."""

from __future__ import annotations

import copy
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

from hf_backrazor import RazorConfig, get_razor_model

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def model_and_batch() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    sys.path.insert(0, str(RECIPES))
    try:
        from docstring_task import docstring_task
        from offline_data import minilm_folder
    finally:
        sys.path.remove(str(RECIPES))
    rows = docstring_task()["train"]
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    classes = len(set(rows["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes, dtype=torch.float32)
    encoded = [tokenizer(text, truncation=True, max_length=128) for text in rows[:16]["text"]]
    labels = rows[:16]["label"]
    batch = DataCollatorWithPadding(tokenizer)(
        [{**each, "labels": label} for each, label in zip(encoded, labels, strict=True)]
    )
    return model.train(), dict(batch)


def gradients_by_kind(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kind of parameter, the same in all layers -> its gradients."""
    torch.manual_seed(3)
    model.zero_grad()
    model(**batch).loss.backward()
    kinds = defaultdict(list)
    for name, parameter in model.named_parameters():
        # The gradient of a key's bias is zero but for rounding: softmax is invariant to it.
        if parameter.grad is not None and not name.endswith("key.bias"):
            kinds[re.sub(r"layer\.\d+\.", "", name)].append(parameter.grad.flatten().double())
    return {kind: torch.cat(grads) for kind, grads in kinds.items()}


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_every_group_of_parameters_has_a_cosine_of_0_95(
    preset: str, model_and_batch: tuple[PreTrainedModel, dict[str, Tensor]]
) -> None:
    model, batch = model_and_batch
    dense = gradients_by_kind(model, batch)
    razor = gradients_by_kind(get_razor_model(copy.deepcopy(model), RazorConfig.preset(preset)), batch)
    cosines = {kind: torch.nn.functional.cosine_similarity(grad, razor[kind], 0).item() for kind, grad in dense.items()}
    assert len(cosines) > 20
    assert min(cosines.values()) > 0.95, sorted(cosines.items(), key=lambda item: item[1])[:3]
    assert cosines["classifier.weight"] > 0.999
