"""What only a running model shows, looked at once, in its first training forward."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .modules import RazorLMHead, RazorModule


def watch_first_forward(model: nn.Module) -> RemovableHandle:
    """Warn, in the first training forward of `model`, of what razor cannot see or do there.

    - Layers whose weight is used without the layer being called: what that computation saves stays dense.
    - Activation checkpointing: it saves next to nothing already, so that razor gains little.
    - A cache of keys and values: it keeps them whole, beside the packed ones.

    Returns:
        The hook's handle, which the model must hold as `_razor_watch`.
    """

    return model.register_forward_pre_hook(_before_forward, with_kwargs=True)


# A function of the module, not a closure: models are pickled and copied with their hooks.
def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    if detect_fake_mode() is not None:  # an estimate, with other tensors in place of the weights
        return
    model._razor_watch.remove()
    _notice_checkpointing(model)
    watch = _WeightUse(model)

    def after(model: nn.Module, args: tuple, output: Any) -> None:
        stop.remove()
        watch.close()
        _notice_cache(output)

    stop = model.register_forward_hook(after, always_call=True)
    watch.__enter__()


def _notice_cache(output: Any) -> None:
    if getattr(output, "past_key_values", None) is not None:
        warnings.warn(
            "the model returns a cache, which keeps the keys and values of every layer whole for as long as the output "
            "lives; for training set `model.config.use_cache = False`",
            stacklevel=2,
        )


def _notice_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and any(
            isinstance(m, RazorModule) for m in module.modules()
        ):
            warnings.warn(
                f"activation checkpointing is on (first in {name or 'the model itself'}): it saves the inputs of whole "
                "blocks and computes the rest again, so that packing what lies inside gains little; use one of the two",
                stacklevel=2,
            )
            return


class _WeightUse(TorchDispatchMode):
    """Notes trained weights of razor layers that are computed with while no module that owns them is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            # A head is meant to be used so: by the loss.
            razor = isinstance(module, RazorModule) and not isinstance(module, RazorLMHead)
            if razor and isinstance(weight, Tensor) and weight.requires_grad:
                self._names[id(weight)] = name
        self._running: dict[int, int] = defaultdict(int)
        self._used: dict[str, None] = {}
        self._handles = []
        for module in model.modules():
            # A tied weight has several owners: an embedding may use what is also a razor head's weight.
            if owned := [id(p) for p in module.parameters(recurse=False) if id(p) in self._names]:
                self._handles += self._follow(module, owned)

    def _follow(self, module: nn.Module, owned: list[int]) -> list[RemovableHandle]:
        def change(by: int) -> None:
            for weight in owned:
                self._running[weight] += by

        return [
            module.register_forward_pre_hook(lambda *_: change(1)),
            module.register_forward_hook(lambda *_: change(-1), always_call=True),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for argument in args:
            if id(argument) in self._names and not self._running[id(argument)]:
                self._used[self._names[id(argument)]] = None
        return func(*args, **(kwargs or {}))

    def close(self) -> None:
        """Stop watching, and warn of what was seen."""
        self.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        if self._used:
            warnings.warn(
                "saved dense, as the weight is used without calling the layer: " + ", ".join(self._used),
                stacklevel=2,
            )
