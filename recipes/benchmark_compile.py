"""Training under `torch.compile(fullgraph=True)`: what is saved between forward and backward, and the time of a step.

    python recipes/benchmark_compile.py
    python recipes/benchmark_compile.py --models BERT Llama --backend inductor --turns 11

One row for each model, plain and with LoRA: MiB saved by the dense model, by razor, and by razor compiled; then
seconds of a step of the dense model, and ratios to it of dense compiled, razor, and razor compiled. The compiler
raises an error where it would have to break its graph. Variants take turns; ratios are medians of those of each turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from benchmark_speed import machine, ratios_of_turns
from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes

HIDDEN, HEADS, INNER, LAYERS, VOCABULARY = 256, 4, 1024, 2, 4000
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
}


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SIZES))


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(image_size=128, patch_size=16, **SIZES))


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, use_cache=False, **sizes))
    model.loss_type = "ForCausalLM"  # or Transformers logs that it guesses it, which the compiler does not trace
    return model


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **SIZES))


MODELS = {"BERT": bert, "ViT": vit, "GPT-2": gpt2, "Llama": llama}


def batch_for(name: str) -> dict[str, Tensor]:
    if name == "ViT":
        return {"pixel_values": torch.randn(8, 3, 128, 128), "labels": torch.randint(2, (8,))}
    tokens = torch.randint(100, VOCABULARY, (8, 128))
    return {"input_ids": tokens, "labels": torch.randint(2, (8,)) if name == "BERT" else tokens}


def seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.zero_grad()
    start = time.perf_counter()
    model(**batch).loss.backward()
    return time.perf_counter() - start


def row(name: str, lora: bool, backend: str, turns: int) -> list[str]:
    torch.manual_seed(0)
    model, batch = MODELS[name](), batch_for(name)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8))
    dense = model.train()
    razor = get_razor_model(copy.deepcopy(dense), RazorConfig())
    models = {"dense": dense, "dense compiled": torch.compile(copy.deepcopy(dense), backend=backend, fullgraph=True)}
    models |= {"razor": razor, "razor compiled": torch.compile(copy.deepcopy(razor), backend=backend, fullgraph=True)}
    times: dict[str, list[float]] = {variant: [] for variant in models}
    for turn in range(turns + 3):
        for variant, each in models.items():
            taken = seconds(each, batch)
            if turn >= 3:
                times[variant].append(taken)
    saved = [measure_saved_bytes(models[each], **batch).total for each in ("dense", "razor", "razor compiled")]
    ratios = [
        statistics.median(ratios_of_turns(times[variant], times["dense"]))
        for variant in ("dense compiled", "razor", "razor compiled")
    ]
    return [
        name + (", LoRA" if lora else ""),
        *(f"{size / 2**20:.2f}" for size in saved),
        f"{statistics.median(times['dense']):.3f}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    parser.add_argument("--turns", type=int, default=11)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(machine("cpu"))
    print("\n| | dense, MiB | razor | compiled | dense, s | dense compiled, ratio | razor | razor compiled |")
    print("|---" * 8 + "|")
    for name in args.models:
        for lora in (False, True):
            print(f"| {' | '.join(row(name, lora, args.backend, args.turns))} |", flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
