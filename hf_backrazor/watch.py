"""What only a running model shows, looked at once, in its first training forward."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .compat import detect_fake_mode, tree_leaves
from .modules import RazorBlock, RazorInline, RazorLMHead, RazorModule, sees_probes
from .prepare import warn_dense


def is_first_forward(model: nn.Module) -> bool:
    """Whether a call of `model` now would be a training forward with its own weights, so that it shows something."""
    if not (model.training and torch.is_grad_enabled()):
        return False
    # In an estimate other tensors are in place of the weights. And the dense half of a report shows no calls.
    enabled = all(module.razor_enabled for module in model.modules() if isinstance(module, RazorModule))
    return enabled and detect_fake_mode() is None


def watched_forward(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(*args, **kwargs)` of `model`, with warnings of what razor cannot see or do there.

    - Layers with a forward of their own in which nothing was seen that razor has an operator for.
    - Layers whose weight is used without the layer being called: what that computation saves stays dense.
    - Activation checkpointing: it saves next to nothing already, so that razor gains little.
    - A cache of keys and values: it keeps them whole, beside the packed ones.
    """
    _notice_checkpointing(model)
    # Whatever ends the forward, an interrupt as well, ends the mode.
    with _WeightUse(model) as uses:
        output = forward(*args, **kwargs)
    if uses.found:
        warnings.warn(
            "saved dense, as the weight is used without calling the layer: " + ", ".join(uses.found), stacklevel=3
        )
    _notice_own_forwards(model)
    _notice_cache(output)
    return output


# Kinds of functions that are all that a layer does.
_LAYERS = {"linear", "convolution", "norm", "pooling"}


def _notice_own_forwards(model: nn.Module) -> None:
    dense: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        reason = module.razor_reason if isinstance(module, RazorInline) else None
        # A product may be part of a norm of any kind.
        if reason and module.razor_calls.forwards and not _LAYERS.intersection(module.razor_calls.kinds):
            dense[reason].append(name)
    warn_dense(dense, stacklevel=4)


def _notice_cache(output: Any) -> None:
    if getattr(output, "past_key_values", None) is not None:
        warnings.warn(
            "the model returns a cache, which keeps the keys and values of every layer whole for as long as the output "
            "lives; for training set `model.config.use_cache = False`",
            stacklevel=2,
        )


def _notice_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        inside = [m for m in module.modules() if isinstance(m, RazorModule)]
        taken_over = any(isinstance(m, RazorBlock) for m in inside)
        if getattr(module, "gradient_checkpointing", False) and inside and not taken_over:
            warnings.warn(
                f"activation checkpointing is on (first in {name or 'the model itself'}): it saves the inputs of whole "
                "blocks and computes the rest again, so that packing what lies inside gains little; use one of the two",
                stacklevel=2,
            )
            return


# Not a mode of the dispatcher: under one of those torch takes other paths, as in max_pool1d, whose result has other
# strides then, so that what comes after differs in its last bit.
class _WeightUse(TorchFunctionMode):
    """Notes trained weights of razor layers that are computed with while no module that owns them is running.

    Attributes:
        found: names of these layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")  # one that is parametrized would be computed
            # A head is meant to be used so: by the loss. What has no operator saves nothing packed.
            razor = isinstance(module, RazorModule) and not isinstance(module, RazorLMHead)
            razor = razor and module.kind not in ("recomputed", "inline", "other")
            if razor and isinstance(weight, Tensor) and weight.requires_grad:
                self._names[id(weight)] = name
        self._running: dict[int, int] = defaultdict(int)
        self.found: dict[str, None] = {}
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
            module.register_forward_pre_hook(sees_probes(lambda *_: change(1))),
            module.register_forward_hook(sees_probes(lambda *_: change(-1)), always_call=True),
        ]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = [id(x) for x in (*args, *kwargs.values()) if id(x) in self._names and not self._running[id(x)]]
        # Not where code looks at a dtype or a shape.
        if used and any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(result)):
            self.found |= dict.fromkeys(self._names[each] for each in used)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
