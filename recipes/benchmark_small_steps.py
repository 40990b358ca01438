"""Where packing stops paying: forward and backward of two BERT layers, from a few tokens to many.

    python recipes/benchmark_small_steps.py

needs no download and takes some three minutes on two CPU cores. What packing costs beside the elements themselves
(calls, bookkeeping) shows in small tensors; `RazorConfig(min_numel=...)` leaves tensors of fewer elements dense.
As in `benchmark_speed.py`, the variants take turns and each is compared to the dense step of its turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from transformers import BertConfig, BertModel

from benchmark_speed import DENSE, machine
from hf_backrazor import RazorConfig, get_razor_model

VARIANTS = {DENSE: None, "balanced": RazorConfig(), "fast": RazorConfig.preset("fast")}


def milliseconds(width: int, tokens: int, turns: int) -> dict[str, list[float]]:
    """Of each step of each variant; the first three turns, which warm up, are left out."""
    config = BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=width // 64
    )
    inputs = torch.randn(max(tokens // 128, 1), min(tokens, 128), width, requires_grad=True)
    models = {}
    for name, razor in VARIANTS.items():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        models[name] = (model if razor is None else get_razor_model(model, razor)).train()
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns + 3):
        for name, model in models.items():
            start = time.perf_counter()
            model(inputs_embeds=inputs).last_hidden_state.sum().backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: each[3:] for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--turns", type=int, default=31)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(machine("cpu"))
    print("\n| width | tokens | elements | dense, ms | balanced, ratio | fast, ratio |\n|---|---|---|---|---|---|")
    for width in args.widths:
        for tokens in args.tokens:
            times = milliseconds(width, tokens, args.turns if tokens * width < 10**6 else max(5, args.turns // 4))
            ratios = [
                statistics.median(a / b for a, b in zip(times[name], times[DENSE], strict=True))
                for name in ("balanced", "fast")
            ]
            dense = statistics.median(times[DENSE])
            print(
                f"| {width} | {tokens} | {width * tokens} | {dense:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
