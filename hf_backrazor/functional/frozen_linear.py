"""Frozen linear layers of any code: nothing is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .differentiation import twice_differentiable
from .precision import current_autocast


def frozen_linear(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` for a `function` whose derivative depends on no element of `x`, and with nothing to train.

    Backward calls it once more, on zeros in place of `x`, and goes on through what that has saved.

    Args:
        function: such as a linear layer with a quantised weight.
        x: `(..., in_features)`, float.
    """
    return _FrozenLinear.apply(function, x)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.shape, ctx.dtype, ctx.device = function, x.shape, x.dtype, x.device
        ctx.autocast = current_autocast(x.device.type)
        return function(x).detach()  # no view, which autograd would not let anybody change in place

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        again = torch.is_grad_enabled()
        with torch.enable_grad(), ctx.autocast:
            x = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device, requires_grad=True)
            y = ctx.function(x)
        (grad_input,) = torch.autograd.grad(y, x, grad_output, create_graph=again)
        return None, grad_input
