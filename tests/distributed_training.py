"""Razor models through Accelerate and Trainer on several processes; started by test_distributed.py.

    accelerate launch --multi_gpu --num_processes 2 distributed_training.py FOLDER

Writes `FOLDER/rank<N>.json`: case -> what this rank saw.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from architectures import Batch, make
from distributed_gradients import ITEMS, four_items
from distributed_worker import run_worker
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes

MODELS = ("bert", "gpt2", "vit")
ACCUMULATED = ("lossless", "balanced", "compact")
RESUMED = ("balanced", "fast", "compact")
TRAINED = ("bert", "gpt2")


def fresh(name: str, dropout: float | None = None, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Batch]:
    """The same weights and the same batch of `ITEMS` on every rank."""
    torch.manual_seed(0)
    model, batch = make(name)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    batch = {key: four_items(value) for key, value in batch.items() if key != "attention_mask"}
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest difference, relative to the greatest element of `expected`."""
    largest = max(value.abs().max().item() for value in expected.values())
    return max((found[key] - value).abs().max().item() for key, value in expected.items()) / largest


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = (torch.cat([grads[key].flatten() for key in expected]).double() for grads in (found, expected))
    return cosine_similarity(*flat, dim=0).item()


def differs_between_ranks(accelerator: Accelerator, values: dict[str, Tensor]) -> bool:
    flat = torch.cat([value.flatten() for value in values.values()])
    every = accelerator.gather(flat.unsqueeze(0))
    return not all(torch.equal(every[0], other) for other in every[1:])


def accumulation(name: str, preset: str, accelerator: Accelerator) -> dict[str, Any]:
    # In double precision a rounding error of one process does not flip what another keeps.
    model, batch = fresh(name, dropout=0.0, dtype=torch.float64)
    config = RazorConfig.preset(preset)
    alone = get_razor_model(copy.deepcopy(model), config)
    alone(**batch).loss.backward()
    expected = gradients(alone)

    model = get_razor_model(model, config)
    parallel = accelerator.prepare(model)
    steps = accelerator.gradient_accumulation_steps
    share = ITEMS // accelerator.num_processes // steps
    synchronised, differed = [], []
    for step in range(steps):
        start = (accelerator.process_index * steps + step) * share
        with accelerator.accumulate(parallel):
            micro_batch = {key: value[start : start + share] for key, value in batch.items()}
            accelerator.backward(parallel(**micro_batch).loss)
        synchronised.append(accelerator.sync_gradients)
        differed.append(differs_between_ranks(accelerator, gradients(model)))
    return {"synchronised": synchronised, "differed": differed, "difference": furthest(gradients(model), expected)}


class Step(NamedTuple):
    """One training step, its gradients averaged over the processes."""

    output: Any
    gradients: dict[str, Tensor]
    linear_bytes: int  # saved by linear layers


def training_step(name: str, preset: str | None, accelerator: Accelerator) -> Step:
    model, batch = fresh(name)
    if preset is not None:
        model = get_razor_model(model, RazorConfig.preset(preset))
    parallel = accelerator.prepare(model)
    share = ITEMS // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    batch = {key: value[own] for key, value in batch.items()}
    set_seed(7, device_specific=True)
    output = parallel(**batch)
    accelerator.backward(output.loss)
    saved = measure_saved_bytes(model, **batch).by_module
    return Step(
        output,
        gradients(model),
        sum(saved.get(key, 0) for key, module in model.named_modules() if getattr(module, "kind", "") == "linear"),
    )


def mixed_precision(name: str, single: Accelerator, steps: dict[str | None, Step]) -> dict[str, Any]:
    """`steps` are those of preset -> mixed precision."""
    dense, razor, lossless = steps[None], steps["balanced"], steps["lossless"]
    in_single = {preset: training_step(name, preset, single) for preset in steps}
    return {
        "logits": str(dense.output.logits.dtype),
        "same_logits": [torch.equal(step.output.logits, dense.output.logits) for step in (razor, lossless)],
        "loss_difference": max(abs((step.output.loss - dense.output.loss).item()) for step in (razor, lossless)),
        "lossless_cosine": cosine(lossless.gradients, dense.gradients),
        "cosine": cosine(razor.gradients, dense.gradients),
        "cosine_in_single": cosine(in_single["balanced"].gradients, in_single[None].gradients),
        "gradient_dtypes": sorted({str(gradient.dtype) for gradient in razor.gradients.values()}),
        "linear_bytes": lossless.linear_bytes,
        "linear_bytes_in_single": in_single["lossless"].linear_bytes,
    }


def resuming(name: str, preset: str, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    def prepared(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Batch]:
        model, batch = fresh(name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model = get_razor_model(model, RazorConfig.preset(preset))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        set_seed(seed, device_specific=True)  # of dropout and, in the preset "fast", of rounding
        return model, optimizer, batch

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        share = ITEMS // accelerator.num_processes
        own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        for _ in range(2):
            accelerator.backward(model(**{key: value[own] for key, value in batch.items()}).loss)
            optimizer.step()
            optimizer.zero_grad()

    def state(model: nn.Module) -> dict[str, Tensor]:
        return copy.deepcopy(accelerator.unwrap_model(model).state_dict())

    model, optimizer, batch = prepared(seed=1)
    train(model, optimizer, batch)
    accelerator.save_state(str(folder))
    saved = state(model)
    train(model, optimizer, batch)
    whole = state(model)
    accelerator.free_memory()

    model, optimizer, batch = prepared(seed=2)
    others = state(model)
    accelerator.load_state(str(folder))
    loaded = state(model)
    train(model, optimizer, batch)
    resumed = state(model)
    accelerator.free_memory()
    return {
        "other_weights_before": any(not torch.equal(others[key], saved[key]) for key in saved),
        "loaded": all(torch.equal(loaded[key], saved[key]) for key in saved),
        "trained": any(not torch.equal(whole[key], saved[key]) for key in saved),
        "resumed": all(torch.equal(resumed[key], whole[key]) for key in whole),
    }


def trainer(name: str, folder: Path) -> dict[str, Any]:
    def trained(config: RazorConfig | None, folder: Path) -> tuple[Trainer, dict[str, Tensor]]:
        model, batch = fresh(name, dropout=0.0, dtype=torch.float64)
        model = model if config is None else get_razor_model(model, config)
        before = copy.deepcopy(model.state_dict())
        rows = [{key: value[item] for key, value in batch.items()} for item in range(ITEMS)] * 3
        arguments = TrainingArguments(
            str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=0.5, optim="sgd", max_grad_norm=0.0,
            save_steps=3, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        training = Trainer(model, arguments, train_dataset=rows)
        training.train()
        return training, {key: value - before[key] for key, value in model.state_dict().items()}

    _, expected = trained(None, folder / "dense")
    training, found = trained(RazorConfig.preset("lossless"), folder / "razor")
    checkpoint = folder / "razor" / "checkpoint-3"
    return {
        "processes": training.args.world_size,
        "wrapped": type(training.model_wrapped).__name__,
        "difference": furthest(found, expected),
        "differs_between_ranks": differs_between_ranks(training.accelerator, found),
        "files": sorted(file.name for file in checkpoint.iterdir()),
    }


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rank = accelerator.process_index
    found: dict[str, Any] = {"processes": accelerator.num_processes}
    for name in MODELS:
        for preset in ACCUMULATED:
            found[f"accumulation, {name}, {preset}"] = accumulation(name, preset, accelerator)
            accelerator.free_memory()
    for preset in RESUMED:
        found[f"resuming, {preset}"] = resuming("bert", preset, accelerator, folder / f"state-{preset}")
    AcceleratorState._reset_state()
    mixed = Accelerator(cpu=True, mixed_precision="bf16")
    presets = (None, "balanced", "lossless")
    steps = {name: {preset: training_step(name, preset, mixed) for preset in presets} for name in MODELS}
    AcceleratorState._reset_state()
    single = Accelerator(cpu=True)
    for name in MODELS:
        found[f"bf16, {name}"] = mixed_precision(name, single, steps[name])
    for name in TRAINED:
        found[f"trainer, {name}"] = trainer(name, folder / f"trainer-{name}")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_worker(main)
