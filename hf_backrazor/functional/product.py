"""The product of a gated MLP, act(gate) * up: both factors packed, the product itself not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..packing import Layout, Packed, PackSpec
from .differentiation import is_wanted, restored, saved_parts, twice_differentiable
from .layouts import ProductLayout, gradient_by_rows
from .sharing import note_origin, pack_shared


def product(x: Tensor, y: Tensor, spec: PackSpec) -> Tensor:
    """`x * y` with both packed: dX = dP y, dY = dP x.

    What consumes the product restores it from the same two copies.

    Args:
        x: float.
        y: float, of the same shape and dtype.
        spec: how they are packed, where no other operator's copy serves (see `pack_shared`).
    """
    left, right = pack_shared(x, spec), pack_shared(y, spec)
    result = _Product.apply(x, y, left, right)
    layout = ProductLayout(left.layout, len(left.parts), right.layout)
    note_origin(result, Packed(layout, left.parts + right.parts))
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, left: Packed, right: Packed) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.left, ctx.right, ctx.left_parts = left.layout, right.layout, len(left.parts)
        ctx.save_for_backward(*saved_parts(x, left), *saved_parts(y, right))
        return x * y

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks each of them a single time
        left, right = saved[: ctx.left_parts], saved[ctx.left_parts :]
        needs_x, needs_y = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            needs_x, needs_y = needs_x and is_wanted(ctx, 0), needs_y and is_wanted(ctx, 1)
        grad_x = _times(grad_output, ctx.right, right, constant=not ctx.needs_input_grad[1]) if needs_x else None
        grad_y = _times(grad_output, ctx.left, left, constant=not ctx.needs_input_grad[0]) if needs_y else None
        return grad_x, grad_y, None, None


def _times(grad_output: Tensor, layout: Layout, parts: tuple[Tensor, ...], constant: bool) -> Tensor:
    """`grad_output` times what `parts` hold, a few rows at a time."""
    if torch.is_grad_enabled():
        return grad_output * restored(layout, parts, grad_output.dtype, constant)
    return gradient_by_rows(grad_output, layout, parts)
