"""TRL's trainers with a razor model: as they come, with the losses and metrics of dense training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl")

from datasets import Dataset
from invented_talks import InventedTalks, score
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
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
from hf_backrazor.modules import RazorModule

TALKS = InventedTalks(vocabulary_size=240, words=16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return TALKS.tokenizer()


def llama(cls: type[nn.Module] = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return cls(LlamaConfig(**sizes, **TALKS.tokens, num_hidden_layers=3, num_labels=1))


LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


def trainers(trainer: type, arguments: type, data: Dataset, **others: Any) -> Callable[..., Any]:
    """Makes a trainer of this kind for a model and settings."""

    def make(model: nn.Module, settings: dict[str, Any]) -> Any:
        return trainer(model=model, args=arguments(**settings), train_dataset=data, **others)

    return make


class Saved:
    """Bytes that the forwards of a trainer's `compute_loss` leave for backward; the parameters aside."""

    def __init__(self, trainer: Any) -> None:
        self.bytes: list[int] = []
        self._plain = trainer.compute_loss
        self._trainer = trainer
        trainer.compute_loss = self

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = self._plain(model, *args, **kwargs)
        self.bytes.append(sum(kept.values()))
        return result


def train(make_trainer: Callable[..., Any], model: nn.Module, folder: Path, **settings: Any) -> tuple[Any, list, int]:
    """The trainer, what it logged in each step, and what it saved in the last."""
    common = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "learning_rate": 1e-3,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    trainer = make_trainer(model, {**common, **settings})
    saved = Saved(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = [
        {name: value for name, value in entry.items() if isinstance(value, float) and "time" not in name}
        for entry in logged
    ]
    return trainer, numbers, saved.bytes[-1]


def assert_same_log(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def losses(log: list[dict]) -> list[dict]:
    return [{"loss": entry["loss"]} for entry in log]


# TRL checkpoints activations unless told otherwise.
DENSE = {"gradient_checkpointing": False}

SFT = {
    "as it comes": {},
    "without checkpointing": DENSE,
    "packed": {**DENSE, "packing": True, "max_length": 64},
    "assistant only": {**DENSE, "assistant_only_loss": True},
    "dft": {**DENSE, "loss_type": "dft"},
    "bfloat16": {**DENSE, "bf16": True},
}


@pytest.mark.parametrize("adapters", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", SFT)
def test_sft(name: str, adapters: LoraConfig | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make = trainers(SFTTrainer, SFTConfig, TALKS.talks(), processing_class=tokenizer, peft_config=adapters)
    _, expected, dense = train(make, llama(), tmp_path, **SFT[name])
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy"} <= set(expected[0])
    _, exact, _ = train(make, get_razor_model(llama(), RazorConfig.preset("lossless")), tmp_path, **SFT[name])
    assert_same_log(exact, expected, 2e-2 if name == "bfloat16" else 1e-4)
    trainer, found, razor = train(make, get_razor_model(llama()), tmp_path, **SFT[name])
    assert_same_log(losses(found), losses(expected), 1e-2)
    if adapters is not None:
        # They came after the razor.
        assert isinstance(
            trainer.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default"), RazorModule
        )
    if name != "as it comes":  # with checkpointing, little is saved in any case
        assert razor * 4 < dense


@pytest.mark.parametrize("adapters", [None, LORA], ids=["full", "lora"])
def test_packed_checkpoints_take_over_what_sft_turns_on(
    adapters: LoraConfig | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make = trainers(SFTTrainer, SFTConfig, TALKS.talks(), processing_class=tokenizer, peft_config=adapters)
    _, expected, checkpointing = train(make, llama(), tmp_path)
    _, found, compact = train(make, get_razor_model(llama(), RazorConfig.preset("compact")), tmp_path)
    assert_same_log(losses(found), losses(expected), 1e-2)
    assert compact * 1.5 < checkpointing


@pytest.mark.parametrize("adapters", [None, LORA], ids=["full", "lora"])
def test_dpo(adapters: LoraConfig | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    others = {"processing_class": tokenizer, "peft_config": adapters}
    if adapters is None:  # with adapters, the model without them is the reference
        others["ref_model"] = llama()
    make = trainers(DPOTrainer, DPOConfig, TALKS.preferences(), **others)
    _, expected, dense = train(make, llama(), tmp_path, **DENSE)
    _, exact, _ = train(make, get_razor_model(llama(), RazorConfig.preset("lossless")), tmp_path, **DENSE)
    assert_same_log(exact, expected, 1e-4)
    _, found, razor = train(make, get_razor_model(llama()), tmp_path, **DENSE)
    assert_same_log(losses(found), losses(expected), 2e-2)
    assert razor * 2 < dense


@pytest.mark.parametrize("adapters", [None, LORA], ids=["full", "lora"])
def test_reward(adapters: LoraConfig | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make = trainers(RewardTrainer, RewardConfig, TALKS.preferences(), processing_class=tokenizer, peft_config=adapters)
    plain, to_be_exact, to_be_packed = (llama(LlamaForSequenceClassification) for _ in range(3))
    _, expected, dense = train(make, plain, tmp_path, **DENSE)
    _, exact, _ = train(make, get_razor_model(to_be_exact, RazorConfig.preset("lossless")), tmp_path, **DENSE)
    assert_same_log(exact, expected, 1e-3)
    _, _, razor = train(make, get_razor_model(to_be_packed), tmp_path, **DENSE)
    assert razor * 4 < dense


@pytest.mark.parametrize("adapters", [None, LORA], ids=["full", "lora"])
def test_grpo(adapters: LoraConfig | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    others = {"processing_class": tokenizer, "peft_config": adapters, "reward_funcs": score}
    make = trainers(GRPOTrainer, GRPOConfig, TALKS.prompts(), **others)
    settings = {**DENSE, "num_generations": 4, "max_completion_length": 12}
    _, expected, dense = train(make, llama(), tmp_path, **settings)
    assert all(entry["grad_norm"] > 0 for entry in expected)
    _, exact, _ = train(make, get_razor_model(llama(), RazorConfig.preset("lossless")), tmp_path, **settings)
    assert_same_log(exact, expected, 1e-3)
    _, _, razor = train(make, get_razor_model(llama()), tmp_path, **settings)
    assert razor * 2 < dense
