"""Gradients of data-parallel razor models beside those of one process; started by test_distributed.py.

    accelerate launch --multi_gpu --num_processes 2 distributed_gradients.py FOLDER

Writes `FOLDER/rank<N>.json`: case -> what this rank saw.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from architectures import make
from distributed_worker import run_worker
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_backrazor import RazorConfig, RazorModel, get_razor_model
from hf_backrazor.config import RAZOR_CONFIG_NAME

MODELS = ("bert", "gpt2", "vit")
CONFIGS = {
    "paper": {"preset": "paper", "sparsity": 0.9},
    "balanced": {"preset": "balanced"},
    "sample": {"preset": "balanced", "granularity": "sample"},
    "lossless": {"preset": "lossless"},
    "compact": {"preset": "compact"},
    # Top-k over the whole batch depends on what else is in the batch: the one case that has to differ.
    "tensor": {"preset": "balanced", "granularity": "tensor", "sparsity": 0.9, "residual_bits": 0},
}
ITEMS = 4


def case(name: str, settings: dict[str, Any], accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)  # the same weights and the same batch on every rank
    model, batch = make(name)
    # In double precision a rounding error of one process does not flip what another keeps.
    model.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {key: four_items(value) for key, value in batch.items() if key != "attention_mask"}
    settings = dict(settings)
    config = RazorConfig.preset(settings.pop("preset"), **settings)

    alone = get_razor_model(copy.deepcopy(model), config)
    loss = alone(**batch).loss
    loss.backward()
    expected = {key: p.grad for key, p in alone.named_parameters()}

    model = get_razor_model(model, config)
    parallel = accelerator.prepare(model)
    share = ITEMS // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    own_loss = parallel(**{key: value[own] for key, value in batch.items()}).loss
    accelerator.backward(own_loss)
    difference = max((p.grad - expected[key]).abs().max().item() for key, p in model.named_parameters())
    largest = max(grad.abs().max().item() for grad in expected.values())

    unwrapped = accelerator.unwrap_model(parallel)
    target = folder / f"{name}-saved-by-{accelerator.process_index}"
    unwrapped.save_pretrained(target, is_main_process=accelerator.is_main_process)
    return {
        "wrapped": type(parallel) is DistributedDataParallel,
        "razor": unwrapped is model and isinstance(unwrapped, RazorModel),
        "loss": loss.item(),
        "mean_loss": accelerator.reduce(own_loss.detach(), "mean").item(),
        "own_loss": own_loss.item(),
        "difference": difference / largest,
        "wrote_config": (target / RAZOR_CONFIG_NAME).exists(),
    }


def four_items(value: Tensor) -> Tensor:
    """The architectures' batches have an odd number of items."""
    return torch.cat([value, value[:1].flip(-1) if value.dim() > 1 else value[:1]]).to(
        torch.float64 if value.is_floating_point() else value.dtype
    )


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found = {"processes": accelerator.num_processes}
    for name in MODELS:
        for label, settings in CONFIGS.items():
            found[f"{name}-{label}"] = case(name, settings, accelerator, folder)
            accelerator.wait_for_everyone()
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_worker(main)
