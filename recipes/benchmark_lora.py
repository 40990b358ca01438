"""What adapters leave for the razor: memory of full fine-tuning, LoRA and DoRA, each without and with it.

    python recipes/benchmark_lora.py

needs no download and takes some ten minutes on two CPU cores. ViT-B/16, BERT-base and GPT-2 come with random weights
(bytes depend on shapes alone), their default dropout, labels and loss; adapters of rank 8 sit on PEFT's default targets
(for ViT, attention's q and v). Adapters spare gradients and the optimizer's state, and of the activations only what
the gradients of frozen weights would need. Every figure is taken in a process of its own:

- saved: bytes that autograd holds between forward and backward, without parameters and the batch;
- peak: the high-water mark of one step less what is there before it; gradients are there before it.

In brackets: how many times less than the same training without the razor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmark_workloads import LORA_TARGETS, WORKLOADS
from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from peak_memory import peak_over_idle, return_freed_memory

FULL, LORA, DORA = "full fine-tuning", "LoRA r=8", "DoRA r=8"
TRAINED = (FULL, LORA, DORA)
RAZOR = {"": None, "razor, balanced": RazorConfig(), "razor, fast": RazorConfig.preset("fast")}
DEFAULT_WORKLOADS = [name for name in WORKLOADS if name != "GPT-2 1x1024"]

Figures = dict[str, float | None]


def measure(workload: str, trained: str, razor: str) -> Figures:
    """Saved and peak memory, in MiB. Runs in a process of its own."""
    return_freed_memory()
    torch.manual_seed(0)
    model, batch = WORKLOADS[workload]()
    if trained != FULL:
        targets = LORA_TARGETS[model.config.model_type]
        model = get_peft_model(model, LoraConfig(r=8, use_dora=trained == DORA, target_modules=targets))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if RAZOR[razor] is not None:
        model = get_razor_model(model, RAZOR[razor])

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=False)

    step()
    return {
        "peak_mib": peak_over_idle(step),
        "saved_mib": measure_saved_bytes(model, **batch).total / 2**20,
    }


def measure_apart(workload: str, trained: str, razor: str) -> Figures:
    print(f"{workload}: {row_name(trained, razor)}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--measure", workload, trained, razor]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{workload}, {row_name(trained, razor)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def row_name(trained: str, razor: str) -> str:
    return f"{trained}, {razor}" if razor else f"{trained} alone"


def table(figures: dict[str, dict[str, Figures]]) -> str:
    """A Markdown table of all workloads: workload -> row -> what `measure` returns."""
    lines = ["| | " + " | ".join(f"{workload}: saved MiB | peak MiB" for workload in figures) + " |"]
    lines.append("|---" * (1 + 2 * len(figures)) + "|")
    for trained in TRAINED:
        for razor in RAZOR:
            cells = [row_name(trained, razor)]
            for rows in figures.values():
                found, alone = rows[row_name(trained, razor)], rows[row_name(trained, "")]
                cells += [_cell(found[key], alone[key], bool(razor)) for key in ("saved_mib", "peak_mib")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: float | None, alone: float | None, compared: bool) -> str:
    if found is None:
        return "-"
    return f"{found:.0f} ({alone / found:.1f}x)" if compared else f"{found:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=DEFAULT_WORKLOADS)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return

    figures = {
        workload: {
            row_name(trained, razor): measure_apart(workload, trained, razor) for trained in TRAINED for razor in RAZOR
        }
        for workload in args.workloads
    }
    print(table(figures))
    if args.json:
        unfinished = args.json.with_name(f".{args.json.name}.unfinished")
        unfinished.write_text(json.dumps(figures, indent=2), encoding="utf-8")
        os.replace(unfinished, args.json)


if __name__ == "__main__":
    main()
