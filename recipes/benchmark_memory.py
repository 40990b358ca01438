"""What training saves for backward, how high its memory peaks, and how good the gradients are: dense training,
activation checkpointing, LoRA, the paper's Back Razor, and the balanced preset with each number of residual bits.

    python recipes/benchmark_memory.py

needs no download and takes some thirty minutes on two CPU cores. The models come with random weights (bytes depend on
shapes alone), their default dropout, labels and loss. Every figure of a workload is taken in a
process of its own. The columns:

- saved: bytes that autograd (or a checkpoint) holds between forward and backward, without parameters and the batch;
- peak: the high-water mark of one step less what is there before it; gradients are there before it;
- bits: saved bits for each element that dense training (SDPA) saves;
- fidelity: cosine between razor and dense gradient of one batch, for the same dropout, over the encoder's parameters
  of the pretrained MiniLM-L6 on real text; with --vision and --images, of trained models on real images as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from benchmark_workloads import (
    LORA_TARGETS,
    WORKLOADS,
    Batch,
    llama,
    with_checkpointing,
    with_fixed_batch_norms,
    with_lora,
    with_packed_checkpoints,
)
from docstring_task import docstring_task
from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from offline_data import minilm_folder
from peak_memory import peak_over_idle, return_freed_memory

RAZOR_ROWS = {
    "razor, paper 0.9": RazorConfig.preset("paper", sparsity=0.9),
    "razor, paper 0.97": RazorConfig.preset("paper", sparsity=0.97),
    "razor, balanced, residual_bits=1": RazorConfig(residual_bits=1),
    "razor, balanced, residual_bits=2": RazorConfig(residual_bits=2),
    "razor, balanced (residual_bits=3)": RazorConfig(),
    "razor, balanced, residual_bits=4": RazorConfig(residual_bits=4),
    "razor, fast": RazorConfig.preset("fast"),
}
EAGER, SDPA, CHECKPOINTING, LORA = "dense, eager attention", "dense, SDPA", "activation checkpointing", "LoRA r=8"
COMPACT = "razor, compact"
# The paper's setting for convolutional networks; rows of models that have batch norms.
FIXED_DENSE, FIXED_PAPER = "dense, batch norms fixed", "razor, paper 0.9, batch norms fixed"
ROWS = (EAGER, SDPA, CHECKPOINTING, LORA, *RAZOR_ROWS, COMPACT, FIXED_DENSE, FIXED_PAPER)


def applies(row: str, model: nn.Module) -> bool:
    """Whether there is such a row for the model: some have no attention, others no batch norm."""
    if row in (FIXED_DENSE, FIXED_PAPER):
        return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if row == EAGER:
        return model._supports_sdpa
    return row != LORA or model.config.model_type in LORA_TARGETS


def measure(workload: str, row: str) -> dict[str, float | None] | None:
    """Saved bytes, elements saved and peak of one row that applies. Runs in a process of its own."""
    return_freed_memory()
    torch.manual_seed(0)
    model, batch = WORKLOADS[workload]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if not applies(row, model):
        return None
    if row in (FIXED_DENSE, FIXED_PAPER):
        model = with_fixed_batch_norms(model)
    if row == EAGER:
        model.set_attn_implementation("eager")
    elif row == LORA:
        model = with_lora(model)
    elif row == CHECKPOINTING:
        model = with_checkpointing(model)
    elif row == COMPACT:
        model = with_packed_checkpoints(model)
    elif row == FIXED_PAPER:
        model = get_razor_model(model, RAZOR_ROWS["razor, paper 0.9"])
    elif row in RAZOR_ROWS:
        model = get_razor_model(model, RAZOR_ROWS[row])
    saved = measure_saved_bytes(model, **batch)

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=False)

    step()
    return {
        "saved_bytes": saved.total,
        "saved_elements": sum(saved.elements.values()),
        "peak_mib": peak_over_idle(step),
    }


def measure_apart(workload: str, row: str) -> dict[str, float | None] | None:
    print(f"{workload}: {row}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--measure", workload, row]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{workload}, {row} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def text_case() -> tuple[PreTrainedModel, Batch]:
    folder = minilm_folder()
    rows = docstring_task()["train"].shuffle(seed=0).select(range(16))
    batch = dict(
        AutoTokenizer.from_pretrained(folder)(
            list(rows["text"]), truncation=True, max_length=128, padding=True, return_tensors="pt"
        )
    )
    batch["labels"] = torch.tensor(list(rows["label"]))
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=9), batch


def image_case(folder: str, dataset: str) -> tuple[PreTrainedModel, Batch]:
    # Here and not above: only this needs Pillow.
    from transformers import AutoImageProcessor

    from chosen_dataset import load_splits
    from image_pixels import as_pil_image

    rows = load_splits(dataset)[0].select(range(8))
    images = [as_pil_image(image, 3) for image in rows["image"]]
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    classes = rows.features["label"].num_classes
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=classes, ignore_mismatched_sizes=True)
    return model, {"pixel_values": pixels, "labels": torch.tensor(list(rows["label"]))}


def measure_fidelity(case: Callable[[], tuple[PreTrainedModel, Batch]], rows: list[str]) -> dict[str, float]:
    torch.manual_seed(0)
    model, batch = case()
    model.train()

    def gradient() -> Tensor:
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "layer" in name]).double()

    dense = gradient()
    result = {}
    for row in rows:
        if row in RAZOR_ROWS or row == COMPACT:
            get_razor_model(model, RAZOR_ROWS.get(row, RazorConfig.preset("compact")))
            result[row] = nn.functional.cosine_similarity(gradient(), dense, dim=0).item()
            model.remove_razor()
    return result


def table(figures: dict[str, dict[str, Any]], fidelity: dict[str, dict[str, float]]) -> str:
    """A Markdown table for one workload. Factors are against dense training, with eager attention where it was run."""
    reference = next(name for name in (EAGER, SDPA, *figures) if name in figures)
    lines = ["| | saved MiB | peak MiB | bits an element | " + " | ".join(f"fidelity, {m}" for m in fidelity) + " |"]
    lines.append("|---" * (4 + len(fidelity)) + "|")
    for row, figure in figures.items():
        saved = figure["saved_bytes"]
        factor = f" ({figures[reference]['saved_bytes'] / saved:.1f}x)"
        peak = "-" if figure["peak_mib"] is None else f"{figure['peak_mib']:.0f}"
        bits = f"{8 * saved / figures[SDPA]['saved_elements']:.2f}" if SDPA in figures else "-"
        # Those that change nothing about the gradient have a fidelity of 1; LoRA and frozen norms train others.
        exact = "-" if row in (LORA, FIXED_DENSE, FIXED_PAPER) else "1"
        cosines = [f"{cosine[row]:.3f}" if row in cosine else exact for cosine in fidelity.values()]
        lines.append(f"| {row} | " + " | ".join([f"{saved / 2**20:.1f}{factor}", peak, bits, *cosines]) + " |")
    return "\n".join(lines)


def print_leftovers() -> None:
    for name, make in {**WORKLOADS, "Llama, 12 layers of 768, 2x512": llama}.items():
        model, batch = make()
        print(f"\n## {name}\n\n{get_razor_model(model).memory_report(**batch)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--vision", nargs="+", metavar="FOLDER", default=[], help="trained models to measure fidelity on; with --images"
    )
    parser.add_argument("--images", metavar="FOLDER", help="their data, as image_classification.py's --dataset")
    parser.add_argument("--leftovers", action="store_true", help="show instead what balanced still saves, and where")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    if args.leftovers:
        print_leftovers()
        return

    fidelity = {"MiniLM": measure_fidelity(text_case, args.rows)}
    for folder in args.vision:
        fidelity[Path(folder).name] = measure_fidelity(partial(image_case, folder, args.images), args.rows)
    figures: dict[str, dict[str, Any]] = {}
    for name in args.workloads:
        measured = {row: measure_apart(name, row) for row in args.rows}
        figures[name] = {row: figure for row, figure in measured.items() if figure is not None}
        print(f"\n{name}\n\n{table(figures[name], fidelity)}", flush=True)
    if args.json:
        unfinished = args.json.with_name(f".{args.json.name}.unfinished")
        unfinished.write_text(json.dumps({"figures": figures, "fidelity": fidelity}, indent=2), encoding="utf-8")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
