"""`RazorCallback`: what Trainer logs of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Batch, make
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_backrazor import RazorCallback, RazorConfig, get_razor_model, measure_saved_bytes


def rows_of(batch: Batch, count: int = 8) -> list[Batch]:
    return [{name: tensor[0] for name, tensor in batch.items()} for _ in range(count)]


def trainer_of(model: nn.Module, batch: Batch, folder: Path, **options: Any) -> Trainer:
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    given = {name: options.pop(name) for name in ("callbacks", "eval_dataset") if name in options}
    arguments = TrainingArguments(str(folder), disable_tqdm=True, **{**settings, **options})
    return Trainer(model, arguments, train_dataset=rows_of(batch), **given)


class Tracker(TrainerCallback):
    """Keeps what is logged, as trackers do."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("razor", [True, False], ids=["razor", "dense"])
def test_logs_what_a_step_saves(razor: bool, tmp_path: Path) -> None:
    model, batch = make("bert")
    if razor:
        get_razor_model(model)
    trainer = trainer_of(model, batch, tmp_path, callbacks=[RazorCallback()])
    trainer.train()
    pair = {name: torch.stack([row[name] for row in rows_of(batch, 2)]) for name in batch}
    expected = measure_saved_bytes(model, **pair).total / 2**20
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["saved_activations_mib"] == pytest.approx(expected, abs=0.01)
        assert entry["peak_memory_mib"] > 50  # this process holds torch
    # The end of training is no step.
    assert "saved_activations_mib" not in trainer.state.log_history[-1]
    trainer.save_state()
    assert "saved_activations_mib" in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]


def test_add_to_comes_before_trackers(tmp_path: Path) -> None:
    model, batch = make("bert")
    get_razor_model(model)
    late, early = Tracker(), Tracker()
    trainer_of(model, batch, tmp_path / "late", callbacks=[late, RazorCallback()]).train()
    assert not any("saved_activations_mib" in entry for entry in late.seen)
    trainer = trainer_of(model, batch, tmp_path / "early", callbacks=[early])
    callback = RazorCallback()
    assert callback.add_to(trainer) is callback
    trainer.train()
    assert sum("saved_activations_mib" in entry for entry in early.seen) == 2


def test_training_with_the_callback_gives_the_same_weights(tmp_path: Path) -> None:
    found = []
    for name, callbacks in (("with", [RazorCallback()]), ("without", [])):
        torch.manual_seed(0)
        model, batch = make("gpt2")
        model.config.use_cache = False
        get_razor_model(model, RazorConfig.preset("fast"))
        trainer_of(model, batch, tmp_path / name, callbacks=callbacks, logging_steps=1).train()
        found.append(model.state_dict())
        assert not model._forward_pre_hooks
        assert not model._forward_hooks
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_evaluation_is_not_measured(tmp_path: Path) -> None:
    model, batch = make("bert")
    get_razor_model(model)
    options = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "callbacks": [RazorCallback()]}
    trainer = trainer_of(model, batch, tmp_path, eval_dataset=rows_of(batch, 4), **options)
    trainer.train()
    for entry in trainer.state.log_history:
        assert ("saved_activations_mib" in entry) == ("loss" in entry)
