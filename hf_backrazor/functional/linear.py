"""Linear layers: dX and db exact, dW from the packed input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_fake, is_traced
from ..packing import Layout, Packed, PackSpec, fast_with_integers, weight_gradient
from .differentiation import is_wanted, restored, saved_parts, twice_differentiable
from .layouts import ColumnAffineLayout
from .precision import accumulate_dtype, compute_dtype
from .sharing import pack_shared
from .traced import cast_again


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: PackSpec | None,
    transposed: bool = False,
    weight_gradient: str = "dense",
) -> Tensor:
    """`torch.nn.functional.linear` with a packed input saved for the weight's gradient.

    dX = dY W and db = sum(dY) are exact; dW = dY^T x takes x from its packed copy, which every consumer of the same
    tensor shares.

    Args:
        x: `(..., in_features)`, float; under autocast the copy is packed in autocast's dtype.
        weight: `(out_features, in_features)`, or `(in_features, out_features)` if `transposed`.
        bias: `(out_features,)` or None; required if `transposed`.
        spec: how `x` is packed, where no other operator's copy serves (see `pack_shared`). None: not at all, as the
            weight is frozen.
        transposed: compute as Transformers' `Conv1D` does.
        weight_gradient: `"dense"`, from unpacked floats; or `"int8"`, from the codes as integers and dY rounded to 8
            bits at random (drawing a seed from torch's CPU generator in backward), where `x` is coded in a way that
            allows for that and the device is fast at it.

    Returns:
        `(..., out_features)`, bit-equal to the dense operator's.
    """
    packed = None if spec is None else pack_shared(x, spec, compute_dtype(x))
    return _Linear.apply(x, weight, bias, packed, transposed, weight_gradient == "int8")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: Packed | None,
        transposed: bool,
        integers: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layout = None if packed is None else packed.layout
        # In a graph of the compiler, the seed of what is rounded at random would be a constant.
        ctx.integers = integers and not is_traced()
        ctx.transposed = transposed
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *(() if packed is None else saved_parts(x, packed)))
        if transposed:
            assert bias is not None
            y = torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[-1])
        else:
            y = F.linear(x, weight, bias)
        return y.detach()  # no view, which autograd would not let anybody change in place

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = grad_sum = None
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[0]:
            cast = is_traced() and weight.dtype != grad_output.dtype
            compute = cast_again(weight, grad_output.dtype) if cast else weight.to(grad_output.dtype)
            grad_input = grad_rows @ (compute.t() if ctx.transposed else compute)
            grad_input = grad_input.view(ctx.input_shape).to(ctx.input_dtype)
        again = torch.is_grad_enabled()
        if ctx.needs_input_grad[1] and (not again or is_wanted(ctx, 1)):
            if again:
                x = restored(ctx.layout, parts, grad_rows.dtype, constant=not ctx.needs_input_grad[0])
                rows = x.reshape(-1, x.shape[-1])
                grad_weight = rows.t() @ grad_rows if ctx.transposed else grad_rows.t() @ rows
            elif ctx.integers:
                grad_weight, grad_sum = _grads_by_integers(grad_rows, ctx.layout, parts, ctx.transposed)
            if grad_weight is None:
                grad_sum = grad_rows.sum(0) if ctx.needs_input_grad[2] else None
                grad_weight = _grad_weight(grad_rows, grad_sum, ctx.layout, parts, ctx.transposed)
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = (grad_rows.sum(0) if grad_sum is None else grad_sum).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None


def _grads_by_integers(
    grad_rows: Tensor, layout: Layout, parts: Sequence[Tensor], transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `_grad_weight`, from the codes, and db; None where they do not allow for that, or it would not be faster."""
    gamma = beta = None
    if isinstance(layout, ColumnAffineLayout):
        parts, gamma, beta = layout.split(parts)
        layout = layout.x_hat
    if grad_rows.dtype == torch.float64 or not fast_with_integers(grad_rows, layout.matrix[1]):
        return None, None
    integers = layout.integers(parts)
    if integers is None:
        return None, None
    seed = 0 if is_fake(grad_rows) else int(torch.randint(2**32, ()))  # an estimate draws nothing
    return weight_gradient(grad_rows.float(), integers, gamma, beta, transposed, seed)


def _grad_weight(
    grad_rows: Tensor, grad_sum: Tensor | None, layout: Layout, parts: Sequence[Tensor], transposed: bool
) -> Tensor:
    """dY^T x, or x^T dY if `transposed`, with x unpacked a few rows at a time.

    For x = gamma x_hat + beta, dY^T x is (dY^T x_hat) gamma + sum(dY) beta^T. `grad_sum` is sum(dY), if it is there.
    """
    if isinstance(layout, ColumnAffineLayout):
        parts, gamma, beta = layout.split(parts)
        grad_weight = _grad_weight(grad_rows, grad_sum, layout.x_hat, parts, transposed)
        by_input = grad_weight.t() if transposed else grad_weight
        if gamma is not None:
            by_input *= gamma.to(grad_weight.dtype)
        if beta is not None:
            by_input.addr_(grad_rows.sum(0) if grad_sum is None else grad_sum, beta.to(grad_weight.dtype))
        return grad_weight
    total = None
    for start, stop, x in layout.slices(parts, grad_rows.dtype):
        grad = grad_rows[start:stop]
        left, right = (x.t(), grad) if transposed else (grad.t(), x)
        if total is None:
            total = left @ right
            if stop < layout.matrix[0]:
                total = total.to(accumulate_dtype(total))
        elif total.dtype == right.dtype:
            total.addmm_(left, right)
        else:
            total += left @ right
    assert total is not None
    return total
