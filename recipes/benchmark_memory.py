"""What dense training and each preset save for backward, and how far the gradients of each preset are from dense ones.

    python recipes/benchmark_memory.py

needs no download. Saved bytes depend on shapes alone, so ViT-B/16, BERT-base and GPT-2 come with random weights, with
their default dropout. The bytes that GPT-2's head and loss save (its logits, which razor leaves alone) are left out of
its columns. Gradient fidelity is measured where weights matter: on the pretrained MiniLM-L6 and real text, as the
cosine between razor and dense gradient of one batch over all parameters of the encoder, for the same dropout.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from docstring_task import docstring_task
from hf_backrazor import RazorConfig, SavedBytes, get_razor_model, measure_saved_bytes
from offline_data import minilm_folder

Batch = dict[str, Tensor]

ROWS: dict[str, RazorConfig | None] = {
    "dense, eager attention": None,
    "dense, SDPA": None,
    "lossless": RazorConfig.preset("lossless"),
    "paper 0.8": RazorConfig.preset("paper", sparsity=0.8),
    "paper 0.9": RazorConfig.preset("paper", sparsity=0.9),
    "fast": RazorConfig.preset("fast"),
    "balanced": RazorConfig.preset("balanced"),
}


def vit() -> tuple[PreTrainedModel, Batch]:
    model = ViTForImageClassification(ViTConfig(num_labels=10))
    return model, {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.arange(8)}


def bert() -> tuple[PreTrainedModel, Batch]:
    tokens = torch.randint(1000, 30000, (8, 128))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(8) % 2}
    return BertForSequenceClassification(BertConfig()), batch


def gpt2() -> tuple[PreTrainedModel, Batch]:
    tokens = torch.randint(0, 50000, (2, 512))
    return GPT2LMHeadModel(GPT2Config(use_cache=False)), {"input_ids": tokens, "labels": tokens}


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, Batch]]] = {
    "ViT-B/16 8x224x224": vit,
    "BERT-base 8x128": bert,
    "GPT-2 2x512": gpt2,
}


def saved_mib(saved: SavedBytes) -> float:
    # The model itself ("") saves what its loss needs.
    return sum(size for name, size in saved.by_module.items() if name not in ("", "lm_head")) / 2**20


def measure_memory(make: Callable[[], tuple[PreTrainedModel, Batch]]) -> dict[str, float]:
    model, batch = make()
    result = {}
    for row, config in ROWS.items():
        model.set_attn_implementation("eager" if "eager" in row else "sdpa")
        if config is not None:
            get_razor_model(model, config)
        result[row] = saved_mib(measure_saved_bytes(model, **batch))
        if config is not None:
            model.unload()
    return result


def measure_fidelity() -> dict[str, float]:
    folder = minilm_folder()
    rows = docstring_task()["train"].shuffle(seed=0).select(range(16))
    batch = dict(
        AutoTokenizer.from_pretrained(folder)(
            list(rows["text"]), truncation=True, max_length=128, padding=True, return_tensors="pt"
        )
    )
    batch["labels"] = torch.tensor(list(rows["label"]))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=9).train()

    def gradient() -> Tensor:
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        grads = [p.grad.flatten() for name, p in model.named_parameters() if "encoder" in name]
        return torch.cat(grads).double()

    dense = gradient()
    result = {}
    for row, config in ROWS.items():
        if config is not None:
            get_razor_model(model, config)
            result[row] = nn.functional.cosine_similarity(gradient(), dense, dim=0).item()
            model.unload()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="loss_type")

    figures: dict[str, dict[str, Any]] = {name: measure_memory(make) for name, make in MODELS.items()}
    fidelity = measure_fidelity()

    print("| saved for backward, MiB | " + " | ".join(figures) + " | gradient fidelity, MiniLM |")
    print("|---" * (len(figures) + 2) + "|")
    for row in ROWS:
        cells = [row]
        for sizes in figures.values():
            factor = sizes["dense, eager attention"] / sizes[row]
            cells.append(f"{sizes[row]:.0f} ({factor:.1f}x)")
        cells.append(f"{fidelity[row]:.3f}" if row in fidelity else "1")
        print("| " + " | ".join(cells) + " |")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"saved_mib": figures, "fidelity": fidelity}, file, indent=2)


if __name__ == "__main__":
    main()
