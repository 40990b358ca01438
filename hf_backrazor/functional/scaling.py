"""A tensor times one trained number for each of its columns: dX exact, the numbers' gradient from the packed tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..packing import Packed, PackSpec
from .precision import accumulate_dtype
from .sharing import pack_shared


def scaling(x: Tensor, scale: Tensor, spec: PackSpec) -> Tensor:
    """`x * scale` with `x` packed: dX = dY scale is exact, and dscale = sum(dY x) takes x from its packed copy.

    Args:
        x: `(..., n)`, float.
        scale: `(n,)`, or `(1, ..., 1, n)` with no more dimensions than `x`; float.
        spec: how `x` is packed, where no other operator's copy serves (see `pack_shared`).

    Returns:
        As `x`, bit-equal to the dense product, in the dtype that it has.
    """
    return _Scaling.apply(x, scale, pack_shared(x, spec))


class _Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, packed: Packed) -> Tensor:
        ctx.layout, ctx.input_dtype = packed.layout, x.dtype
        ctx.save_for_backward(scale, *packed.parts)
        return x * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scale, *parts = ctx.saved_tensors
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output * scale).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            grad_rows = grad_output.reshape(ctx.layout.matrix)
            total = grad_rows.new_zeros(scale.numel(), dtype=accumulate_dtype(grad_rows))
            for start, stop, x in ctx.layout.slices(parts, grad_output.dtype):
                total += (grad_rows[start:stop] * x).sum(0, dtype=total.dtype)
            grad_scale = total.view(scale.shape).to(scale.dtype)
        return grad_x, grad_scale, None
