"""Batch normalisation: the normalised output (or, as in the paper, the input) packed; dbeta exact.

For the formulas see `packing.normalised`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..packing import Packed, PackSpec, batch_norm_gradients, pack, packed_batch_norm_gradients, sparse_layout
from .masked_gradient import with_mask
from .precision import accumulate_dtype
from .sharing import note_affine, pack_shared


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
        note_affine(y, sparse_layout(x.shape, x.dtype, spec), parts, weight, bias, of_channels=True)
    return y


def takes_masks(y: Tensor) -> bool:
    """Whether a `MaskedGradient` of `y` goes as it is to a batch norm that applies it: no hook has to see it before."""
    node = y.grad_fn
    applied = isinstance(node, _BatchNorm._backward_cls) and node.applies_masks
    return applied and not y._backward_hooks and not y.retains_grad


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
        ctx.layout, ctx.applies_masks = None, False
        if not training and not ctx.needs_input_grad[1]:
            ctx.save_for_backward(weight, rstd)
            return (y,)
        if packed_input is not None:
            ctx.layout = packed_input.layout
            ctx.save_for_backward(weight, rstd, mean, *packed_input.parts)
            return (y,)
        per_row = (*x.shape[:2], *(1,) * (x.dim() - 2))
        packed = pack(x, spec, _of_channels(mean, x).expand(per_row), _of_channels(rstd, x).expand(per_row))
        ctx.layout, ctx.applies_masks = packed.layout, x.dtype == wide
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
        grad, mask = with_mask(grad_output)
        grad = grad.to(rstd.dtype)
        gamma = None if weight is None else weight.to(rstd.dtype)
        if ctx.layout is None:  # fixed statistics and weight
            scale = rstd if gamma is None else rstd * gamma
            grad_input = grad * _of_channels(scale, grad) if needs_x else None
            grad_weight, grad_bias = None, grad.sum([0, *range(2, grad.dim())]) if needs_bias else None
        elif ctx.from_input:
            mean, *parts = parts
            x_hat = (ctx.layout.unpack(parts, rstd.dtype) - _of_channels(mean, grad)) * _of_channels(rstd, grad)
            scale = rstd if gamma is None else rstd * gamma
            grad_input, grad_weight, grad_bias = batch_norm_gradients(grad, x_hat, scale, ctx.training)
        else:
            grads = packed_batch_norm_gradients(grad, ctx.layout, parts, rstd, gamma, ctx.training, mask)
            grad_input, grad_weight, grad_bias = grads
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
