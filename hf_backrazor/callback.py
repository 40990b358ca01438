"""`RazorCallback`: saved bytes and peak memory among what Trainer logs."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .model import RazorModel
from .report import counting_saved_bytes

SAVED = "saved_activations_mib"
PEAK = "peak_memory_mib"


class RazorCallback(TrainerCallback):
    """Adds two numbers to every logging step of a `Trainer`, of razor and of dense models.

    - `saved_activations_mib`: what the last forward before it saved for backward, without parameters and the batch. Of
      a loss that is computed outside of the model (label smoothing), that part is not counted.
    - `peak_memory_mib`: the most that was in use so far: allocated on the device by CUDA's allocator, elsewhere
      resident in this process. Left out where neither is known.

    `Trainer(callbacks=[RazorCallback()])` shows them on screen and in `trainer_state.json`. Trackers (TensorBoard,
    Weights & Biases, ...) come before it in the Trainer's list and would miss them: `RazorCallback().add_to(trainer)`
    goes before these.

    With `push_to_hub`, Trainer uploads checkpoints while it trains, but of a model's files only those that it knows.
    With this callback `razor_config.json` is among them.

    Measuring takes one forward in each logging interval, which calls a Python function for each tensor that it saves.
    Forwards that `torch.compile` traces are not measured.
    """

    def __init__(self) -> None:
        self._due = True
        self._saved: int | None = None
        self._hooks: list[RemovableHandle] = []

    def add_to(self, trainer: Trainer) -> RazorCallback:
        """Become the first callback of `trainer`, before any tracker."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(  # type: ignore[override]  # Trainer gives the model by its name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Start watching."""
        if args.push_to_hub and state.is_world_process_zero and isinstance(model, RazorModel):
            model.razor_config.save_pretrained(args.output_dir)  # type: ignore[arg-type]  # Trainer has set it
        measuring = ExitStack()

        def before(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            if self._due and module.training and not torch.compiler.is_compiling():
                self._due = False
                counted = measuring.enter_context(counting_saved_bytes(module, (inputs, named)))
                measuring.callback(lambda: setattr(self, "_saved", sum(counted)))

        def after(*_: object) -> None:
            measuring.close()

        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to a logging step's, not to those of an evaluation or of the end of training."""
        if not logs or "loss" not in logs:
            return
        found = {}
        if self._saved is not None:
            found[SAVED] = round(self._saved / 2**20, 2)
        if (peak := peak_memory(args.device)) is not None:
            found[PEAK] = round(peak / 2**20, 2)
        logs.update(found)
        state.log_history[-1].update(found)
        self._due = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: on a CUDA device, allocated there; elsewhere, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
