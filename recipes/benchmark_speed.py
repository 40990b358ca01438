"""How long a training step takes: dense, with activation checkpointing, LoRA, the paper's Back Razor, and the presets.

    python recipes/benchmark_speed.py

needs no download and takes some twenty minutes on two CPU cores. The variants take turns, step by step, in one process;
what counts is the ratio of a step to the dense one of the same turn, so that a machine that is slower for a while is so
for all. A step is forward, backward and AdamW. Dense means SDPA attention, Transformers' default. A second table has
the primitives, in nanoseconds an element, beside torch's own operations and a plain copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmark_workloads import LORA_TARGETS, WORKLOADS, Batch, with_checkpointing, with_lora, with_packed_checkpoints
from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.functional.activation import GELU, cell_tables
from hf_backrazor.kernels.library import available
from hf_backrazor.packing import (
    PackSpec,
    decode_cells,
    encode_cells,
    norm_gradients,
    pack,
    packed_norm_gradients,
    weight_gradient,
)

DENSE, LORA = "dense, SDPA", "LoRA r=8"
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    DENSE: lambda model: model,
    "activation checkpointing": with_checkpointing,
    LORA: with_lora,
    "razor, paper 0.9": lambda model: get_razor_model(model, RazorConfig.preset("paper")),
    "razor, balanced": lambda model: get_razor_model(model, RazorConfig()),
    "razor, fast": lambda model: get_razor_model(model, RazorConfig.preset("fast")),
    "razor, compact": with_packed_checkpoints,
}


class Training:
    """One variant of a workload, and how long its steps took."""

    def __init__(self, workload: str, variant: str, device: str) -> None:
        torch.manual_seed(0)
        model, batch = WORKLOADS[workload]()
        self.model = VARIANTS[variant](model.to(device)).train()
        self.batch: Batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Train for a step, and note its time."""
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if next(self.model.parameters()).device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)


def measure(workload: str, variants: list[str], turns: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step of each variant; the first turn, which warms up, is left out."""
    if WORKLOADS[workload]()[0].config.model_type not in LORA_TARGETS:
        variants = [variant for variant in variants if variant != LORA]
    trainings = {variant: Training(workload, variant, device) for variant in variants}
    for _ in range(turns + 1):
        for training in trainings.values():
            training.step()
    return {variant: training.seconds[1:] for variant, training in trainings.items()}


def ratios_of_turns(times: list[float], reference: list[float]) -> list[float]:
    """Times of a variant relative to those of another in the same turn, as the machine's pace changes over turns."""
    return [a / b for a, b in zip(times, reference, strict=True)]


def table(seconds: dict[str, list[float]]) -> str:
    """A Markdown table for one workload."""
    lines = ["| | median seconds | median ratio to dense | from | to |", "|---|---|---|---|---|"]
    for variant, each in seconds.items():
        ratios = ratios_of_turns(each, seconds[DENSE])
        low, *_, high = statistics.quantiles(ratios, n=10, method="inclusive")
        middle = statistics.median(ratios)
        lines.append(f"| {variant} | {statistics.median(each):.2f} | {middle:.3f} | {low:.3f} | {high:.3f} |")
    return "\n".join(lines)


def primitives() -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> the elements that a call works on, and the call."""
    x, wide = torch.randn(1576, 768), torch.randn(1576, 3072)
    heads = torch.randn(8, 12, 197, 64)
    grad, weight = torch.randn(1576, 768), torch.ones(768)
    normed, mean, rstd = torch.native_layer_norm(x, (768,), weight, weight, 1e-5)
    coded, wide_grad = pack(x, PackSpec(0.99, bits=3)), torch.randn_like(wide)
    few, of_heads = pack(x, PackSpec(0.99, bits=2)), pack(heads, attention_spec())
    cells, derivatives, _ = cell_tables(GELU, 4)
    sorted_in = encode_cells(wide, cells)
    integers = few.layout.integers(few.parts)
    return {
        "copy (torch)": (x.numel(), x.clone),
        "topk of 1 % in rows (torch)": (x.numel(), lambda: x.abs().topk(8, sorted=False)),
        "kthvalue in rows (torch)": (x.numel(), lambda: x.abs().kthvalue(760)),
        "pack: 1 % exact, 2 bits": (x.numel(), lambda: pack(x, PackSpec(0.99, bits=2))),
        "pack: normalise, 1 % exact, 3 bits": (x.numel(), lambda: pack(x, PackSpec(0.99, bits=3), mean, rstd)),
        "pack: 1 % exact": (wide.numel(), lambda: pack(wide, PackSpec(0.99))),
        "pack: q, k, v": (heads.numel(), lambda: pack(heads, attention_spec())),
        "pack: 10 % of each sample, half precision": (x.numel(), lambda: pack(x.view(8, -1), paper_spec())),
        "unpack: 1 % exact, 2 bits": (x.numel(), few.unpack),
        "unpack: 1 % exact, 3 bits": (x.numel(), coded.unpack),
        "unpack: q, k, v": (heads.numel(), of_heads.unpack),
        "GELU (torch)": (wide.numel(), lambda: F.gelu(wide)),
        "GELU backward (torch)": (wide.numel(), lambda: torch.ops.aten.gelu_backward(wide_grad, wide)),
        "sort into 16 cells": (wide.numel(), lambda: encode_cells(wide, cells)),
        "derivative from cells": (wide.numel(), lambda: decode_cells(sorted_in, 3072, cells, derivatives, x.dtype)),
        "LayerNorm backward (torch)": (x.numel(), lambda: dense_norm_backward(grad, x, mean, rstd, weight)),
        "LayerNorm backward, torch code": (x.numel(), lambda: norm_gradients(grad, normed, rstd, weight, True)),
        "LayerNorm backward from packed x_hat": (
            x.numel(),
            lambda: packed_norm_gradients(grad, coded.layout, coded.parts, rstd, weight, True),
        ),
        "codes to integers": (x.numel(), lambda: few.layout.integers(few.parts)),
        "weight gradient, 768 x 768 (torch)": (x.numel(), lambda: grad.t() @ x),
        "weight gradient, 768 x 768, by integers": (
            x.numel(),
            lambda: weight_gradient(grad, integers, None, None, False, 1),
        ),
        "round dY to 8 bits": (x.numel(), lambda: torch.ops.hf_backrazor.round_gradient(grad, None, 1)),
        "product of integers (torch)": (x.numel(), lambda: torch._int_mm(integers.codes.t(), integers.codes)),
    }


def attention_spec() -> PackSpec:
    """As `balanced` packs q, k and v."""
    return PackSpec(0.99, bits=4, levels="even", centred=True, rotated=True)


def paper_spec() -> PackSpec:
    """As the paper packs."""
    return PackSpec(0.9, "sample", value_dtype="float16")


def dense_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> object:
    """LayerNorm's own backward."""
    return torch.ops.aten.native_layer_norm_backward(grad, x, [768], mean, rstd, weight, weight, [True] * 3)


def primitive_table(turns: int) -> str:
    """A Markdown table of nanoseconds an element, all primitives taking turns."""
    calls = primitives()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns + 2):
        for name, (_numel, call) in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    lines = ["| | ns an element, median | least |", "|---|---|---|"]
    for name, (numel, _call) in calls.items():
        each = [1e9 * value / numel for value in seconds[name][2:]]
        lines.append(f"| {name} | {statistics.median(each):.2f} | {min(each):.2f} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """What this runs on, in a line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model n")]
        processor = names[0] if names else processor
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    packing = "compiled packing" if available() else "packing in torch"
    return f"{processor}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}, {packing}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="dense always runs")
    parser.add_argument("--turns", type=int, default=7, help="steps of each variant, after a first one that warms up")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the seconds of each step to this file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine(device))
    if device == "cpu":
        print(f"\n{primitive_table(21)}", flush=True)
    variants = [DENSE, *(variant for variant in args.variants if variant != DENSE)]
    seconds = {}
    for workload in args.workloads:
        seconds[workload] = measure(workload, variants, args.turns, device)
        print(f"\n{workload}\n\n{table(seconds[workload])}", flush=True)
    if args.json:
        unfinished = args.json.with_name(f".{args.json.name}.unfinished")
        unfinished.write_text(json.dumps({"machine": machine(device), "seconds": seconds}, indent=2), encoding="utf-8")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
