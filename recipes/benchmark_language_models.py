"""What a layer of a large language model saves for backward: dense, with activation checkpointing, and with razor.

    python recipes/benchmark_language_models.py

needs no download, no GPU and no memory for weights: bytes follow from shapes alone (`estimate_saved_bytes`). The layers
are those of Llama 3 8B in bfloat16. A layer's share is half of what four layers save more than two, so that embeddings,
head and loss, and what the first layer keeps in more bits, do not count. LoRA's adapters sit on all linear layers, in
bfloat16 (PEFT makes them float32 unless told otherwise, and dense training then keeps float32 copies of their inputs).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_workloads import with_checkpointing
from hf_backrazor import RazorConfig, estimate_saved_bytes, get_razor_model

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_preset(name: str) -> Callable[[Any], Any]:
    return lambda model: get_razor_model(model, RazorConfig.preset(name))


ROWS: dict[str, Callable[[Any], Any]] = {
    "dense, SDPA": lambda model: model,
    "activation checkpointing": with_checkpointing,
    "razor, balanced": with_preset("balanced"),
    "razor, compact": with_preset("compact"),
}


def saved_bytes(row: str, layers: int, shape: tuple[int, int], rank: int) -> int:
    """What a model of so many layers saves; with adapters, if they have a rank."""
    config = LlamaConfig(**SIZES, **HEADS, num_hidden_layers=layers, max_position_embeddings=shape[1], use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
        if rank:
            model.enable_input_require_grads()  # as checkpointing's first layer needs
            model = get_peft_model(model, LoraConfig(r=rank, target_modules=LINEARS)).bfloat16()
    return estimate_saved_bytes(ROWS[row](model.train()), shape).total


def layer_mib(row: str, shape: tuple[int, int], rank: int) -> float:
    return (saved_bytes(row, 4, shape, rank) - saved_bytes(row, 2, shape, rank)) / 2 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA's adapters")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")

    shape = (args.batch, args.sequence)
    print(f"MiB a layer of Llama 3 8B saves, bfloat16, {args.batch} x {args.sequence} tokens\n")
    print(f"| | full training | LoRA r={args.rank} on all linear layers |\n|---|---|---|", flush=True)
    dense: list[float] = []
    for row in ROWS:
        saved = [layer_mib(row, shape, rank) for rank in (0, args.rank)]
        dense = dense or saved
        cells = [f"{size:.1f} ({whole / size:.1f}x)" for size, whole in zip(saved, dense, strict=True)]
        print(f"| {row} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
