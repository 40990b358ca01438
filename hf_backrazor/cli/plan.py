"""Find what fits into a given memory: the largest batch of each preset, or settings for a batch.

Without --batch, the largest batch that each way of training can take (beyond 32 examples: extrapolated). With --batch,
several settings, and which of them fits first: dense, `lossless`, finer than `balanced`, `balanced`, `compact` in 4 and
in 2 bits (where the model has blocks to compute again), and coarser codes.
Memory is that of weights, gradients, the states of AdamW and activations at the peak of a step, as `hf-backrazor
report` estimates it: leave some room for what the estimate does not know (the allocator, workspaces of operators, and
the CUDA context: 0.5 to 1 GiB).
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from . import subject
from .report import measured
from .text import mebibytes, parse_bytes, table
from .variants import LADDER, VARIANTS, Variant

# Totals grow in a straight line with the batch, once activations outweigh gradients. Larger batches are read from that
# line: of a large model, each step on fake tensors takes seconds.
LARGEST_MEASURED = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's, the memory, and perhaps a batch size."""
    subject.add_arguments(parser)
    parser.add_argument("--memory", required=True, help="what there is, such as 8GiB or 500MB")
    parser.add_argument("--batch", type=subject.positive, help="find settings for batches of this size")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What fits."""
    memory = parse_bytes(arguments.memory)
    model = subject.Subject(arguments)
    data: dict[str, Any] = {
        "model": model.name,
        "class": model.class_name,
        "inputs": model.inputs,
        "dtype": arguments.dtype,
        "memory": memory,
        "batch": arguments.batch,
    }
    if arguments.batch is None:
        data["variants"] = {name: _largest_batch(model, variant, memory) for name, variant in VARIANTS.items()}
        return data
    data["settings"] = {}
    for name, (variant, code) in LADDER.items():
        row = measured(model, variant, arguments.batch)
        if row is not None:
            data["settings"][name] = {**row, "fits": row["total"] <= memory, "code": code}
    data["first that fits"] = next((name for name, row in data["settings"].items() if row["fits"]), None)
    return data


def show(data: dict[str, Any]) -> str:
    """A table, and what follows from it."""
    size = f"{data['memory'] / 2**30:.2f} GiB"
    title = f"{data['class']} ({data['model']}), {data['inputs']}, {data['dtype']}, in {size}"
    if data["batch"] is None:
        rows: list[tuple[str, ...]] = [("", "largest batch", "total, MiB")]
        for name, row in data["variants"].items():
            batch, total = (str(row["batch"]), mebibytes(row["total"])) if row else ("-", "-")
            rows.append((name, batch, total))
        return f"{title}\n\n{table(rows)}"
    rows = [("", "saved, MiB", "total, MiB", "fits")]
    for name, row in data["settings"].items():
        rows.append((name, mebibytes(row["saved"]), mebibytes(row["total"]), "yes" if row["fits"] else "no"))
    chosen = data["first that fits"]
    if chosen is None:
        advice = "Nothing fits: take smaller batches and accumulate gradients, or LoRA, or a smaller model."
    elif not data["settings"][chosen]["code"]:
        advice = "Dense training fits; razor is not needed."
    else:
        advice = f"model = get_razor_model(model, {data['settings'][chosen]['code']})"
    return f"{title}, batches of {data['batch']}\n\n{table(rows)}\n\n{advice}"


def _largest_batch(model: subject.Subject, variant: Variant, memory: int) -> dict[str, int] | None:
    """The largest batch whose total fits, and that total; a batch of 0 if not even one example fits.

    None if the model does not know the variant.
    """
    from .. import estimate_step_memory

    prepared = variant(model.build())
    if prepared is None:
        return None

    def total(batch: int) -> int:
        return estimate_step_memory(prepared, model.shapes(batch)).total

    low, high = (0, 0), (1, total(1))
    while high[1] <= memory:
        low, high = high, (2 * high[0], total(2 * high[0]))
        if high[0] == LARGEST_MEASURED and high[1] <= memory:
            return _extrapolated(low, high, memory)
    if low[0] == 0:
        return {"batch": 0, "total": high[1]}
    while high[0] - low[0] > 1:
        middle = (low[0] + high[0]) // 2
        found = middle, total(middle)
        low, high = (found, high) if found[1] <= memory else (low, found)
    return {"batch": low[0], "total": low[1]}


def _extrapolated(first: tuple[int, int], second: tuple[int, int], memory: int) -> dict[str, int]:
    """The batch at which the straight line through two batches and their totals reaches `memory`."""
    slope = max((second[1] - first[1]) / (second[0] - first[0]), 1.0)
    batch = second[0] + math.floor((memory - second[1]) / slope)
    return {"batch": batch, "total": second[1] + math.ceil(slope * (batch - second[0]))}
