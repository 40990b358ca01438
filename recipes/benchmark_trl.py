"""TRL's trainers side by side, dense and with razor: the same losses, and what they hold for backward.

    python recipes/benchmark_trl.py

needs no download and no GPU. A small Llama with random weights takes three steps on made up talks, preferences and
prompts with each trainer. For each way of storing activations it prints

- held: what `compute_loss` leaves in memory for backward, in MiB;
- difference: the greatest relative one of the losses, gradient norms and metrics that are logged, from the dense ones;
- time: that the processor spends on the second training step, on one thread, as a multiple of the dense one.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from peft import LoraConfig
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.live_memory import LiveMemory
from invented_talks import InventedTalks, score

VOCABULARY_SIZE = 4096
STEPS = 3
DENSE, CHECKPOINTING = "dense", "gradient checkpointing"
ROWS = (DENSE, CHECKPOINTING, "lossless", "balanced", "compact")
LORA = LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.05)

Log = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16, with a dropout of 0.05")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--words", type=int, default=60, help="in what an assistant says")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    print("| | | held, MiB | factor | difference | time |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in args.trainers:
        dense: tuple[Log, float, float] | None = None
        for row in ROWS:
            log, held, seconds = train(name, row, args)
            dense = dense or (log, held, seconds)
            far = "" if row == DENSE else f"{difference(log, dense[0]):.0e}"
            cells = [f"{held:.2f}", f"{dense[1] / held:.1f}x", far, f"{seconds / dense[2]:.2f}"]
            print(f"| {name if row == DENSE else ''} | {row} | {' | '.join(cells)} |", flush=True)


def train(name: str, row: str, args: argparse.Namespace) -> tuple[Log, float, float]:
    """What a trainer logs, the MiB that it holds for backward in the last step, and a step's time."""
    make, settings = TRAINERS[name]
    data = InventedTalks(VOCABULARY_SIZE, args.words)
    model = llama(LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM, args.hidden, data.tokens)
    if row not in (DENSE, CHECKPOINTING):
        get_razor_model(model, RazorConfig.preset(row))
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0,
            "report_to": [], "save_strategy": "no", "bf16": False, "learning_rate": 1e-3, "disable_tqdm": True,
            "dataloader_pin_memory": False, "gradient_checkpointing": row == CHECKPOINTING,
        }  # fmt: skip
        trainer = make({**common, **settings}, model, data, LORA if args.lora else None)
        trainer.remove_callback(PrinterCallback)
        watch = Watch(trainer)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = [{key: x for key, x in entry.items() if isinstance(x, float) and "time" not in key} for entry in logged]
    return numbers, watch.held[-1] / 2**20, watch.seconds[1]


class Watch:
    """What the steps of a trainer hold and how long they take, looked at in the last one and in the others."""

    def __init__(self, trainer: Any) -> None:
        self.held: list[int] = []
        self.seconds: list[float] = []
        self._trainer, self._loss, self._step = trainer, trainer.compute_loss, trainer.training_step
        trainer.compute_loss, trainer.training_step = self.compute_loss, self.training_step

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._trainer.state.global_step < STEPS - 1:
            return self._loss(model, *args, **kwargs)
        there = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and type(x) in (torch.Tensor, nn.Parameter)]
        with LiveMemory(there) as memory:
            result = self._loss(model, *args, **kwargs)
            gc.collect()
            self.held.append(memory.live)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = self._step(*args, **kwargs)
        if self._trainer.state.global_step < STEPS - 1:
            self.seconds.append(time.process_time() - start)
        return result


def difference(log: Log, expected: Log) -> float:
    """The greatest relative difference of what two trainings logged; of numbers below 0.1, the absolute one by it."""
    return max(
        abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 0.1)
        for ours, theirs in zip(log, expected, strict=True)
        for key in theirs
    )


def llama(cls: type[nn.Module], hidden: int, tokens: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 32 * 32}
    heads = {"num_attention_heads": max(1, hidden // 64), "num_key_value_heads": max(1, hidden // 128)}
    return cls(LlamaConfig(**sizes, **heads, **tokens, num_hidden_layers=4, num_labels=1))


def sft(settings: dict[str, Any], model: nn.Module, data: InventedTalks, lora: LoraConfig | None) -> SFTTrainer:
    others = {"processing_class": data.tokenizer(), "peft_config": lora}
    return SFTTrainer(model, SFTConfig(**settings), train_dataset=data.talks(), **others)


def dpo(settings: dict[str, Any], model: nn.Module, data: InventedTalks, lora: LoraConfig | None) -> DPOTrainer:
    others = {"processing_class": data.tokenizer(), "peft_config": lora}
    if lora is None:  # with adapters, the model without them is the reference
        others["ref_model"] = llama(LlamaForCausalLM, model.config.hidden_size, data.tokens)
    return DPOTrainer(model, args=DPOConfig(**settings), train_dataset=data.preferences(), **others)


def reward(settings: dict[str, Any], model: nn.Module, data: InventedTalks, lora: LoraConfig | None) -> RewardTrainer:
    others = {"processing_class": data.tokenizer(), "peft_config": lora}
    return RewardTrainer(model, RewardConfig(**settings), train_dataset=data.preferences(), **others)


def grpo(settings: dict[str, Any], model: nn.Module, data: InventedTalks, lora: LoraConfig | None) -> GRPOTrainer:
    settings = {**settings, "num_generations": 4, "max_completion_length": data.words // 2}
    prompts = data.prompts()
    others = {"processing_class": data.tokenizer(), "peft_config": lora}
    return GRPOTrainer(model, score, args=GRPOConfig(**settings), train_dataset=prompts, **others)


TRAINERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SFT": (sft, {}),
    "SFT, packed": (sft, {"packing": True, "max_length": 128}),
    "SFT, padding-free": (sft, {"padding_free": True, "max_length": None}),
    "SFT, assistant alone": (sft, {"assistant_only_loss": True}),
    "DPO": (dpo, {}),
    "reward": (reward, {}),
    "GRPO": (grpo, {}),
}


if __name__ == "__main__":
    main()
