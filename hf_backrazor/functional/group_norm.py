"""Group normalisation: the normalised output (or, as in the paper, the input) packed; dbeta exact.

With mean and deviation over a group of channels of one sample, x_hat = (x - mean) rstd, and with g = gamma dY and means
over the same elements

    dX = rstd (g - mean(g) - x_hat mean(g x_hat))     dgamma = sum(dY x_hat)     dbeta = sum(dY)

(Y. Wu and K. He, "Group Normalization", 2018).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..compat import suggest_memory_format
from ..packing import Packed, PackSpec, pack, sparse_layout
from .differentiation import replayed, replayed_gradients, restored, saved_parts
from .precision import accumulate_dtype
from .sharing import note_affine, pack_shared


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spec: PackSpec,
    stores: str = "x_hat",
) -> Tensor:
    """`torch.nn.functional.group_norm` with x_hat or x packed.

    Args:
        x: `(batch, channels, *spatial)`, float.
        groups: what the channels are divided into.
        weight: gamma, `(channels,)`, or None.
        bias: beta, `(channels,)`, or None.
        eps: added to the variance.
        spec: how the stored tensor is packed.
        stores: `"x_hat"` or `"input"`.

    Returns:
        As `x`, bit-equal to the dense operator's.
    """
    from_input = pack_shared(x, spec) if stores == "input" else None
    y, *parts = _GroupNorm.apply(x, groups, weight, bias, eps, spec, from_input)
    if parts:
        note_affine(y, sparse_layout(x.shape, x.dtype, spec), parts, weight, bias, of_channels=True)
    return y


def _replay(ctx: Any, grad_output: Tensor, *_parts: None) -> Any:
    if not ctx.from_input:
        return NotImplemented
    weight, _, _, *parts = ctx.saved_tensors

    def plain(x: Tensor, weight: Tensor | None) -> Tensor:
        return torch.nn.functional.group_norm(x.contiguous(), ctx.sizes[-1], weight, None, ctx.eps)

    x = restored(ctx.layout, parts, constant=not ctx.needs_input_grad[0])
    grad_x, grad_weight = replayed_gradients(plain, (x, weight), grad_output.contiguous())
    grad_bias = None
    if ctx.needs_input_grad[3]:
        grad_bias = grad_output.sum([0, *range(2, grad_output.dim())]).to(ctx.bias_dtype)
    return grad_x, None, grad_weight, grad_bias, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        spec: PackSpec,
        packed_input: Packed | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        batch, channels = x.shape[:2]
        sizes = (batch, channels, prod(x.shape[2:]), groups)
        ctx.sizes, ctx.eps = sizes, eps
        # As torch lays it out: sums in another order would differ in their last bits.
        plain = x.contiguous(memory_format=suggest_memory_format(x))
        y, mean, rstd = torch.native_group_norm(plain, weight, bias, *sizes, eps)
        mean, rstd = mean.to(accumulate_dtype(x)), rstd.to(accumulate_dtype(x))
        ctx.from_input, ctx.input_dtype = packed_input is not None, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if packed_input is not None:
            ctx.layout = packed_input.layout
            ctx.save_for_backward(weight, rstd, mean, *saved_parts(x, packed_input))
            return (y,)
        of_channels = (batch, channels, *(1,) * (x.dim() - 2))
        mean_of, rstd_of = (t.repeat_interleave(channels // groups, 1).view(of_channels) for t in (mean, rstd))
        packed = pack(plain, spec, mean_of, rstd_of)
        ctx.layout = packed.layout
        ctx.save_for_backward(weight, rstd, *packed.parts)
        ctx.mark_non_differentiable(*packed.parts)
        return y, *packed.parts

    @staticmethod
    @replayed(_replay)
    def backward(ctx: Any, grad_output: Tensor, *_parts: None) -> tuple[Tensor | None, ...]:
        weight, rstd, *parts = ctx.saved_tensors
        batch, _, _, groups = ctx.sizes
        of_groups = (batch, groups, -1)
        mean = parts.pop(0) if ctx.from_input else None
        # As the gradient is: of tensors that lie in memory in two ways the operator makes nonsense.
        x_hat = ctx.layout.unpack(parts, rstd.dtype).contiguous().view(of_groups)
        if mean is not None:
            x_hat = (x_hat - mean.view(of_groups)) * rstd.view(of_groups)
        grad = grad_output.to(rstd.dtype).contiguous()
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        # The dense operator's gradient at x_hat, whose groups have mean 0 and deviation 1.
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            grad,
            x_hat.view(grad.shape),
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            None if weight is None else weight.to(rstd.dtype),
            *ctx.sizes,
            [needs_x, needs_weight, needs_bias],
        )
        if needs_x:
            grad_input.view(of_groups).mul_(rstd.view(of_groups))
        return (
            grad_input.to(ctx.input_dtype) if needs_x else None,
            None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )
