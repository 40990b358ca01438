"""The product of a gated MLP, act(gate) * up: both factors packed, the product itself not at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..packing import Layout, Packed, PackSpec
from .layouts import ProductLayout
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
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, left: Packed, right: Packed) -> Tensor:
        ctx.left, ctx.right, ctx.left_parts = left.layout, right.layout, len(left.parts)
        ctx.save_for_backward(*left.parts, *right.parts)
        return x * y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors[: ctx.left_parts], ctx.saved_tensors[ctx.left_parts :]
        grad_x = _times(grad_output, ctx.right, right) if ctx.needs_input_grad[0] else None
        grad_y = _times(grad_output, ctx.left, left) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None, None


def _times(grad_output: Tensor, layout: Layout, parts: tuple[Tensor, ...]) -> Tensor:
    """`grad_output` times what `parts` hold, a few rows at a time."""
    result = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    into, grad_rows = result.view(layout.matrix), grad_output.reshape(layout.matrix)
    for start, stop, factor in layout.slices(parts, grad_output.dtype):
        torch.mul(grad_rows[start:stop], factor, out=into[start:stop])
    return result
