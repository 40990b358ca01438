"""Losses that are taken outside of a data-parallel language model; started by test_distributed.py.

    accelerate launch --multi_gpu --num_processes 2 distributed_logits.py FOLDER

Writes `FOLDER/rank<N>.json`: case -> what this rank saw.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from architectures import VOCABULARY, make
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.modules.lm_head import LazyLogits

MODELS = ("gpt2", "roberta")
OPTIONS = {"plain": {}, "static graph": {"static_graph": True}, "unused": {"find_unused_parameters": True}}


def outside(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.view(-1, VOCABULARY), labels.view(-1))


def smoothed(outputs: Any, labels: Tensor) -> Tensor:
    return LabelSmoother(0.2)(outputs, labels)


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {"outside": outside, "smoothed": smoothed}


def fresh(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)  # the same weights on every rank
    model, batch = make(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train(), batch["input_ids"]


def gradients(model: nn.Module, tokens: Tensor, loss: Callable, options: dict[str, Any]) -> tuple[list[Tensor], bool]:
    parallel = DistributedDataParallel(model, **options)
    for _ in range(2):  # a static graph is known after the first step
        parallel.zero_grad()
        outputs = parallel(input_ids=tokens)
        lazy = isinstance(outputs.logits, LazyLogits)
        loss(outputs, tokens).backward()
    return [p.grad for p in model.parameters() if p.grad is not None], lazy


def case(name: str, loss: str, options: dict[str, Any], rank: int) -> dict[str, Any]:
    model, tokens = fresh(name)
    tokens = (tokens + rank) % VOCABULARY  # each rank its own
    expected, _ = gradients(copy.deepcopy(model), tokens, LOSSES[loss], options)
    found, lazy = gradients(get_razor_model(model, RazorConfig.preset("lossless")), tokens, LOSSES[loss], options)
    largest = max(grad.abs().max().item() for grad in expected)
    difference = max((x - y).abs().max().item() for x, y in zip(found, expected, strict=True))
    return {"difference": difference / largest, "lazy": lazy}


def trained(folder: Path, razor: bool) -> list[Tensor]:
    """The weights after two steps of Trainer with label smoothing."""
    model, tokens = fresh("gpt2")
    if razor:
        get_razor_model(model, RazorConfig.preset("lossless"))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=1, max_steps=2, label_smoothing_factor=0.1, use_cpu=True, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.cat([tokens, tokens.flip(-1)])]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return [p.detach() for p in model.parameters()]


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    found: dict[str, Any] = {"processes": accelerator.num_processes}
    for name in MODELS:
        for loss in LOSSES:
            for label, options in OPTIONS.items():
                found[f"{name}, {loss}, {label}"] = case(name, loss, options, rank)
    weights = [trained(folder / "trainer", razor) for razor in (False, True)]
    start = [p.detach() for p in fresh("gpt2")[0].parameters()]
    found["trainer"] = {
        "moved": max((x - y).abs().max().item() for x, y in zip(weights[0], start, strict=True)),
        "difference": max((x - y).abs().max().item() for x, y in zip(*weights, strict=True)),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
