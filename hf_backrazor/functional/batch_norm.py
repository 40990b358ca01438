"""Batch normalisation: the normalised output (or, as in the paper, the input) packed; dbeta exact.

With the statistics of the batch, x_hat = (x - mean) rstd for each channel, and

    dX = gamma rstd (dY - mean(dY) - x_hat mean(dY x_hat))     dgamma = sum(dY x_hat)     dbeta = sum(dY)

with means and sums over batch and space (S. Ioffe and C. Szegedy, "Batch Normalization", 2015). With statistics that
are fixed, dX = gamma rstd dY, which reads nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..packing import Packed, PackSpec, SparseLayout, pack
from .layouts import ChannelAffineLayout
from .precision import accumulate_dtype
from .sharing import note_origin, pack_shared


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    spec: PackSpec,
    stores: str = "x_hat",
) -> Tensor:
    """`torch.nn.functional.batch_norm` with x_hat or x packed.

    Args:
        x: `(batch, channels, *spatial)`, float.
        running_mean: `(channels,)`, or None; changed in place if `training`.
        running_var: as `running_mean`.
        weight: gamma, `(channels,)`, or None.
        bias: beta, `(channels,)`, or None.
        training: normalise by the statistics of the batch; otherwise by the running ones.
        momentum: of the running statistics.
        eps: added to the variance.
        spec: how the stored tensor is packed.
        stores: `"x_hat"` or `"input"`. With fixed statistics and a frozen weight nothing is stored.

    Returns:
        As `x`, bit-equal to the dense operator's.
    """
    from_input = pack_shared(x, spec) if stores == "input" else None
    statistics = (running_mean, running_var, training, momentum, eps)
    y, *parts = _BatchNorm.apply(x, weight, bias, statistics, spec, from_input)
    if parts:
        layout = ChannelAffineLayout(SparseLayout(x.shape, x.dtype, spec), weight is not None, bias is not None)
        scales = tuple(t.detach().clone() for t in (weight, bias) if t is not None)
        note_origin(y, Packed(layout, (*parts, *scales)))
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor | None, Tensor | None, bool, float, float],
        spec: PackSpec,
        packed_input: Packed | None,
    ) -> tuple[Tensor, ...]:
        running_mean, running_var, training, momentum, eps = statistics
        cudnn = torch.backends.cudnn.enabled
        # What F.batch_norm calls; with what it computed on the way.
        y, mean, rstd, _, _ = torch.ops.aten._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn
        )
        wide = accumulate_dtype(x)
        if not training:
            mean, rstd = running_mean.to(wide), (running_var.to(wide) + eps).rsqrt()
        mean, rstd = mean.to(wide), rstd.to(wide)
        ctx.training, ctx.from_input, ctx.input_dtype = training, packed_input is not None, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.layout = None
        if not training and not ctx.needs_input_grad[1]:
            ctx.save_for_backward(weight, rstd)
            return (y,)
        if packed_input is not None:
            ctx.layout = packed_input.layout
            ctx.save_for_backward(weight, rstd, mean, *packed_input.parts)
            return (y,)
        per_row = (*x.shape[:2], *(1,) * (x.dim() - 2))
        packed = pack(x, spec, _of_channels(mean, x).expand(per_row), _of_channels(rstd, x).expand(per_row))
        ctx.layout = packed.layout
        ctx.save_for_backward(weight, rstd, *packed.parts)
        ctx.mark_non_differentiable(*packed.parts)
        return y, *packed.parts

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor | None, *_parts: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 6
        weight, rstd, *parts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad_output.to(rstd.dtype)
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        grad_input = grad_weight = grad_bias = None
        x_hat = None
        if ctx.layout is not None:
            mean = parts.pop(0) if ctx.from_input else None
            x_hat = ctx.layout.unpack(parts, rstd.dtype)
            if mean is not None:
                x_hat = (x_hat - _of_channels(mean, grad)) * _of_channels(rstd, grad)
        if ctx.training:
            # The dense operator's gradient at x_hat, which has mean 0 and deviation 1.
            zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
            grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad.contiguous(), x_hat, scale, None, None, zero, one, True, 0.0, [needs_x, True, True]
            )
        else:
            dimensions = [0, *range(2, grad.dim())]
            grad_input = grad * _of_channels(scale, grad) if needs_x else None
            grad_weight = (grad * x_hat).sum(dimensions) if needs_weight else None
            grad_bias = grad.sum(dimensions) if needs_bias else None
        return (
            grad_input.to(ctx.input_dtype) if needs_x else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def _of_channels(x: Tensor, like: Tensor) -> Tensor:
    """One number a channel, to be broadcast along the other dimensions of `like`."""
    return x.view(1, -1, *(1,) * (like.dim() - 2))
