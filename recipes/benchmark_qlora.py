"""What training adapters on quantised weights saves for backward: dense, with checkpointing, and with razor.

    python recipes/benchmark_qlora.py

needs no download and no GPU. It prints a table for weights in bfloat16, and one for each way of quantising that is
installed and runs here: bitsandbytes in 4 and 8 bits, torchao and quanto. The model is a small Llama with random
weights; LoRA with rank 16 and a dropout of 0.05 sits on all its linear layers but the head.

- held: what a forward leaves in memory for its backward, in MiB: what autograd saves, and what layers keep by
  themselves (bitsandbytes in 8 bits keeps inputs out of autograd's sight);
- cosine: of the gradient of all adapters and the dense one, with the same dropout;
- time: that the processor spends on a step, on one thread, as a multiple of the dense one: the median over turns in
  which each row takes one step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.live_memory import LiveMemory

Step = Callable[[], Tensor]
DENSE = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--adapters", choices=["float32", "bfloat16"], default="float32", help="PEFT's default: float32"
    )
    parser.add_argument("--time", type=int, default=0, metavar="TURNS", help="measure the time of steps as well")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    print(f"Llama with {args.layers} layers of {args.hidden}, {args.batch} x {args.sequence} tokens, bfloat16")
    print(f"LoRA r=16 on all linear layers, dropout 0.05, adapters in {args.adapters}")
    for weights in args.weights:
        print(f"\n### {weights}\n", flush=True)
        try:
            import_module(PACKAGES.get(weights, "torch"))
            table(weights, args)
        except (ImportError, NotImplementedError, AssertionError, RuntimeError, ValueError) as error:
            print(f"skipped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)


def table(weights: str, args: argparse.Namespace) -> None:
    """Print the table for one way of quantising."""
    steps: dict[str, Step] = {}
    lines = []
    reference: Tensor | None = None
    dense = 0.0
    tokens = torch.randint(0, VOCABULARY, (args.batch, args.sequence), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    for row, prepare in ROWS.items():
        model = prepare(adapted(weights, args))
        step = step_of(model, batch)
        gradient = step()
        held = held_mib(model, batch)
        reference = gradient if reference is None else reference
        dense = dense or held
        cosine = torch.nn.functional.cosine_similarity(gradient, reference, dim=0).item()
        lines.append([row, f"{held:.1f}", f"{dense / held:.1f}x", "" if row == DENSE else f"{cosine:.4f}"])
        if args.time:
            steps[row] = step
    for line, ratio in zip(lines, times(steps, args.time), strict=False):
        line.append(f"{ratio:.2f}")
    heads = ["", "held, MiB", "factor", "cosine", "time"][: len(lines[0])]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)), flush=True)


def adapted(weights: str, args: argparse.Namespace) -> nn.Module:
    """A Llama with quantised weights and adapters, in training."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3 // 32 * 32}
    heads = {"num_attention_heads": max(1, args.hidden // 64), "num_key_value_heads": max(1, args.hidden // 128)}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=args.layers, vocab_size=VOCABULARY, use_cache=False)
    model = LlamaForCausalLM(config).bfloat16()
    WEIGHTS[weights](model)
    model.enable_input_require_grads()  # as checkpointing's first layer needs, and TRL sets
    lora = LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.05)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, args.adapters))
        if "lora_B" in name:  # zeros at first, which leave A without a gradient
            nn.init.normal_(parameter, std=0.02)
    return model


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """Takes a step with fixed dropout, and returns the gradient."""

    def step() -> Tensor:
        torch.manual_seed(2)
        model(**batch).loss.backward()
        gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.cat(gradients)

    return step


def held_mib(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """What a forward leaves for backward."""
    gc.collect()
    with LiveMemory([*model.parameters(), *model.buffers(), *batch.values()]) as memory:
        loss = model(**batch).loss
        gc.collect()
        live = memory.live
    del loss
    return live / 2**20


def times(steps: dict[str, Step], turns: int) -> list[float]:
    """Times of steps as multiples of the first one's."""
    taken: dict[str, list[float]] = {row: [] for row in steps}
    for _ in range(turns):
        for row, step in steps.items():
            start = time.process_time()
            step()
            taken[row].append(time.process_time() - start)
    medians = [statistics.median(each) for each in taken.values() if each]
    return [median / medians[0] for median in medians]


def with_checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return model


def with_preset(name: str) -> Callable[[Any], Any]:
    return lambda model: get_razor_model(model, RazorConfig.preset(name))


ROWS: dict[str, Callable[[Any], Any]] = {
    DENSE: lambda model: model,
    "gradient checkpointing": with_checkpointing,
    "`lossless`": with_preset("lossless"),
    "`balanced`": with_preset("balanced"),
    "`compact`": with_preset("compact"),
}
VOCABULARY = 4096


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantised: all but the head."""
    return {n: each for n, each in model.named_modules() if isinstance(each, nn.Linear) and n != "lm_head"}


def bitsandbytes_4bit(model: nn.Module) -> None:
    bnb = import_module("bitsandbytes").nn
    for name, layer in linears(model).items():
        new = bnb.Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, quant_type="nf4")
        new.weight = bnb.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
        model.set_submodule(name, new.to(layer.weight.device))


def bitsandbytes_8bit(model: nn.Module) -> None:
    bnb = import_module("bitsandbytes").nn
    for name, layer in linears(model).items():
        new = bnb.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
        new.weight = bnb.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, new.to(layer.weight.device))


def torchao_weights(config: str, **settings: Any) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        quantization = import_module("torchao.quantization")
        chosen = set(linears(model).values())
        quantization.quantize_(model, getattr(quantization, config)(**settings), lambda layer, _: layer in chosen)

    return quantise


def quanto_8bit(model: nn.Module) -> None:
    quanto = import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)


WEIGHTS: dict[str, Callable[[nn.Module], None]] = {
    "bfloat16": lambda model: None,
    "bitsandbytes, NF4": bitsandbytes_4bit,
    "bitsandbytes, LLM.int8": bitsandbytes_8bit,
    "torchao, int8": torchao_weights("Int8WeightOnlyConfig"),
    "torchao, int4": torchao_weights("Int4WeightOnlyConfig", group_size=32),
    "quanto, int8": quanto_8bit,
}
PACKAGES = {
    "bitsandbytes, NF4": "bitsandbytes",
    "bitsandbytes, LLM.int8": "bitsandbytes",
    "torchao, int8": "torchao",
    "torchao, int4": "torchao",
    "quanto, int8": "optimum.quanto",
}


if __name__ == "__main__":
    main()
