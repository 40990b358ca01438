"""What a layer costs the host: processor time of its Python and of dispatch, with tensors too small to matter.

    python recipes/benchmark_host_time.py

needs no download and takes a minute on one CPU core. On a GPU this is the time before kernels are launched: a step
cannot be faster. Models of hidden size 64 train on 2 x 16 tokens, with two layers and with six; the difference is what
four layers take, forward and backward, without embeddings, heads and losses. Variants take turns, on one thread, and
each is compared to the dense model of its turn; the medians are shown.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from benchmark_speed import DENSE, machine, ratios_of_turns
from hf_backrazor import RazorConfig, get_razor_model

BATCH, LENGTH, HIDDEN = 2, 16, 64
FEW, MANY = 2, 6
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_attention_heads": 4, "vocab_size": 100}

VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    DENSE: lambda model: model,
    "activation checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "balanced": get_razor_model,
    "compact": lambda model: get_razor_model(model, RazorConfig.preset("compact")),
}


def bert(layers: int) -> nn.Module:
    return BertForMaskedLM(BertConfig(num_hidden_layers=layers, **SIZES))


def vit(layers: int) -> nn.Module:
    image = {"image_size": 32, "patch_size": 8}  # 16 patches
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, **SIZES, **image))


def gpt2(layers: int) -> nn.Module:
    sizes = {"n_embd": HIDDEN, "n_head": 4, "vocab_size": 100, "n_positions": LENGTH}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, **sizes, use_cache=False))


def llama(layers: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES, use_cache=False))


MODELS: dict[str, Callable[[int], nn.Module]] = {"BERT": bert, "ViT": vit, "GPT-2": gpt2, "Llama": llama}


def batch_for(name: str) -> dict[str, Tensor]:
    if name == "ViT":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(2, (BATCH,))}
    tokens = torch.randint(100, (BATCH, LENGTH))
    return {"input_ids": tokens, "labels": tokens}


def microseconds(name: str, compiled: bool, turns: int) -> dict[str, list[float]]:
    """Processor time of a layer's forward and backward, by variant, in each turn."""
    batch = batch_for(name)
    models: dict[str, list[nn.Module]] = {}
    for variant, prepare in VARIANTS.items():
        models[variant] = []
        for layers in (FEW, MANY):
            torch.manual_seed(0)
            model = MODELS[name](layers).train()
            prepare(model)
            models[variant].append(torch.compile(model) if compiled else model)
    times: dict[str, list[float]] = {variant: [] for variant in models}
    for turn in range(turns + 5):
        for variant, (few, many) in models.items():
            short, long = seconds(few, batch), seconds(many, batch)
            if turn >= 5:
                times[variant].append(1e6 * (long - short) / (MANY - FEW))
    return times


def seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.zero_grad()
    start = time.process_time()
    model(**batch).loss.backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compile", action="store_true", help="compile all variants")
    parser.add_argument("--turns", type=int, default=41)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(machine("cpu"))
    print("\n| | dense, us a layer | " + " | ".join(f"{name}, ratio" for name in VARIANTS if name != DENSE) + " |")
    print("|---" * (1 + len(VARIANTS)) + "|")
    for name in args.models:
        times = microseconds(name, args.compile, args.turns)
        gc.collect()
        ratios = [
            statistics.median(ratios_of_turns(each, times[DENSE]))
            for variant, each in times.items()
            if variant != DENSE
        ]
        cells = [name, f"{statistics.median(times[DENSE]):.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
