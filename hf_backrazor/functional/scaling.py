"""A tensor times one number for each of its columns or rows: dX exact, the numbers' gradient from the packed tensor.

Columns: the trained vectors of DoRA, IA3 and layer scale. Rows: gates of channels (squeeze and excitation), layer scale
of feature maps, weights of experts' tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..packing import Packed, PackSpec
from .differentiation import is_wanted, restored, saved_parts, twice_differentiable
from .precision import accumulate_dtype
from .sharing import pack_shared


def scaling(x: Tensor, scale: Tensor, spec: PackSpec) -> Tensor:
    """`x * scale` with `x` packed: dX = dY scale is exact, and dscale = sum(dY x) takes x from its packed copy.

    Args:
        x: float, in rows of the last `spec.row_dims` dimensions.
        scale: float, with no more dimensions than `x`; either a vector along the last dimension, where rows have one
            dimension, or any that has size 1 along the dimensions of a row.
        spec: how `x` is packed, where no other operator's copy serves (see `pack_shared`).

    Returns:
        As `x`, bit-equal to the dense product, in the dtype that it has.
    """
    return _Scaling.apply(x, scale, pack_shared(x, spec), spec.row_dims)


class _Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, packed: Packed, row_dims: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.input_dtype, ctx.row_dims = packed.layout, x.dtype, row_dims
        ctx.save_for_backward(scale, *saved_parts(x, packed))
        return x * scale

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scale, *parts = ctx.saved_tensors
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output * scale).to(ctx.input_dtype)
        if ctx.needs_input_grad[1] and torch.is_grad_enabled():
            if is_wanted(ctx, 1):
                x = restored(ctx.layout, parts, grad_output.dtype, constant=not ctx.needs_input_grad[0])
                grad_scale = (grad_output * x).sum_to_size(scale.shape).to(scale.dtype)
        elif ctx.needs_input_grad[1]:
            grad_rows = grad_output.reshape(ctx.layout.matrix)
            dtype = accumulate_dtype(grad_rows)
            slices = ctx.layout.slices(parts, grad_output.dtype)
            if scale.shape[-1] == 1:
                by_row = grad_rows.new_empty(len(grad_rows), dtype=dtype)
                for start, stop, x in slices:
                    torch.sum(grad_rows[start:stop] * x, 1, dtype=dtype, out=by_row[start:stop])
                by_row = by_row.view(*grad_output.shape[: -ctx.row_dims], *(1,) * ctx.row_dims)
                total = by_row.sum_to_size(scale.shape)
            else:
                total = grad_rows.new_zeros(scale.numel(), dtype=dtype)
                for start, stop, x in slices:
                    total += (grad_rows[start:stop] * x).sum(0, dtype=dtype)
            grad_scale = total.view(scale.shape).to(scale.dtype)
        return grad_x, grad_scale, None, None


def rows_of_scaling(x: Tensor, scale: Tensor) -> int | None:
    """How many dimensions a row has, that `scaling` may take `x` and `scale`; None if it cannot."""
    if not 0 < scale.dim() <= x.dim() or torch.broadcast_shapes(x.shape, scale.shape) != x.shape:
        return None
    if 1 < scale.numel() == scale.shape[-1] < x.numel():
        return 1
    whole = (1,) * (x.dim() - scale.dim()) + tuple(scale.shape)
    spatial = max(1, x.dim() - 2)
    if x.dim() > 1 and whole[-spatial:] == (1,) * spatial and x.shape[-spatial:].numel() > 1:
        return spatial
    return None
