"""What torch shows of itself through private functions alone. Checked against torch 2.6 to 2.13."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_functorch_transform() -> bool:
    """Whether code runs inside of a transform of `torch.func`, or of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether `x` stands for a batch of tensors, as inside of `torch.vmap`, and where `is_grads_batched=True`."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


@contextmanager
def hooks_off(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Run no hooks of these tensors inside of the context.

    A backward that calls `torch.autograd.grad` for parameters would run them there, and autograd runs them again when
    it accumulates what that backward returned.
    """
    hooks = [x._backward_hooks for x in tensors if x._backward_hooks]
    copies = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, copy in zip(hooks, copies, strict=True):
            each.update(copy)
