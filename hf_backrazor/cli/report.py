"""Show what a model would save for backward, dense and with each preset.

The model is built without memory for its weights, and nothing is computed: bytes follow from shapes. "saved" is what is
held from forward to backward; "step" what forward and backward hold at most at a time, with gradients; "total" adds
weights and the states of AdamW. Losses are computed as the model does for its labels.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from . import subject
from .text import mebibytes, table
from .variants import VARIANTS, Variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's, and the batch size."""
    subject.add_arguments(parser)
    parser.add_argument("--batch", type=subject.positive, default=8, help="examples in a batch (default: 8)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes for each variant."""
    model = subject.Subject(arguments)
    rows = {name: measured(model, variant, arguments.batch) for name, variant in VARIANTS.items()}
    return {
        "model": model.name,
        "class": model.class_name,
        "batch": arguments.batch,
        "inputs": model.inputs,
        "dtype": arguments.dtype,
        "variants": rows,
    }


def measured(model: subject.Subject, variant: Variant, batch: int) -> dict[str, int] | None:
    """Bytes of one variant; None if the model does not know it."""
    from .. import estimate_step_memory

    prepared = variant(model.build())
    if prepared is None:
        return None
    memory = estimate_step_memory(prepared, model.shapes(batch))
    return {"saved": memory.saved, **dataclasses.asdict(memory), "total": memory.total}


def show(data: dict[str, Any]) -> str:
    """A table."""
    dense = next(row for row in data["variants"].values() if row)
    rows = [("", "saved, MiB", "factor", "step, MiB", "total, MiB")]
    for name, row in data["variants"].items():
        if row is None:
            rows.append((name, "-", "-", "-", "-"))
            continue
        factor = f"{dense['saved'] / row['saved']:.1f}x" if row["saved"] else "-"
        rows.append((name, mebibytes(row["saved"]), factor, mebibytes(row["step"]), mebibytes(row["total"])))
    title = f"{data['class']} ({data['model']}), a batch of {data['batch']} x {data['inputs']}, {data['dtype']}"
    fixed = (
        f"of each total, weights take {mebibytes(dense['weights'])} MiB and AdamW {mebibytes(dense['optimizer'])} MiB"
    )
    return f"{title}\n\n{table(rows)}\n\n{fixed}"
