"""Batch normalisation: the normalised output (or, as in the paper, the input) packed; dbeta exact.

For the formulas see `packing.normalised`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..packing import Packed, PackSpec, batch_norm_gradients, pack, packed_batch_norm_gradients, sparse_layout
from .differentiation import replayed, replayed_gradients, restored, saved_parts
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
        x: `(batch, channels, *spatial)`, float; or `(tokens, channels)`, of which x_hat is stored by channels.
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
    if parts and x.dim() > 2:
        note_affine(y, sparse_layout(x.shape, x.dtype, spec), parts, weight, bias, of_channels=True)
    return y


def _replay(ctx: Any, grad_output: Tensor, *_parts: None) -> Any:
    if not (ctx.from_input or ctx.layout is None):
        return NotImplemented
    weight, rstd, *parts = ctx.saved_tensors
    if ctx.layout is None:  # fixed statistics and weight: nothing but a product
        return *_fixed_gradients(ctx, grad_output, weight, rstd), None, None, None
    mean, *parts = parts

    def plain(x: Tensor, weight: Tensor | None) -> Tensor:
        if ctx.training:
            # Of tensors that lie in memory in two ways torch's backward makes nonsense.
            return torch.nn.functional.batch_norm(x.contiguous(), None, None, weight, None, True, 0.0, ctx.eps)
        y = (x.to(rstd.dtype) - _of_channels(mean, x)) * _of_channels(rstd, x)
        y = y if weight is None else y * _of_channels(weight, x)
        return y.to(grad_output.dtype)

    x = restored(ctx.layout, parts, constant=not ctx.needs_input_grad[0])
    grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_bias = grad_output.sum([0, *range(2, grad_output.dim())]).to(ctx.bias_dtype)
    return *replayed_gradients(plain, (x, weight), grad_output.contiguous()), grad_bias, None, None, None


def _fixed_gradients(
    ctx: Any, grad_output: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor | None, None, Tensor | None]:
    """dX, dgamma and dbeta with fixed statistics and a frozen weight."""
    needs_x, _, needs_bias = ctx.needs_input_grad[:3]
    grad = grad_output.to(rstd.dtype)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    grad_input = (grad * _of_channels(scale, grad)).to(ctx.input_dtype) if needs_x else None
    grad_bias = grad.sum([0, *range(2, grad.dim())]).to(ctx.bias_dtype) if needs_bias else None
    return grad_input, None, grad_bias


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor | None, Tensor | None, bool, float, float],
        spec: PackSpec,
        packed_input: Packed | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        running_mean, running_var, training, momentum, eps = statistics
        cudnn = torch.backends.cudnn.enabled
        # What F.batch_norm calls; with what it computed on the way.
        y, mean, rstd, _, _ = torch.ops.aten._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn
        )
        wide = accumulate_dtype(x)
        if running_mean is not None and running_var is not None and not training:
            mean, rstd = running_mean.to(wide), (running_var.to(wide) + eps).rsqrt()
        mean, rstd = mean.to(wide), rstd.to(wide)
        ctx.training, ctx.from_input, ctx.input_dtype = training, packed_input is not None, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.layout, ctx.eps = None, eps
        if not training and not ctx.needs_input_grad[1]:
            ctx.save_for_backward(weight, rstd)
            return (y,)
        if packed_input is not None:
            ctx.layout = packed_input.layout
            ctx.save_for_backward(weight, rstd, mean, *saved_parts(x, packed_input))
            return (y,)
        maps = _as_maps(x)
        per_row = (*maps.shape[:2], *(1,) * (maps.dim() - 2))
        packed = pack(maps, spec, _of_channels(mean, maps).expand(per_row), _of_channels(rstd, maps).expand(per_row))
        ctx.layout = packed.layout
        ctx.save_for_backward(weight, rstd, *packed.parts)
        ctx.mark_non_differentiable(*packed.parts)
        return y, *packed.parts

    @staticmethod
    @replayed(_replay)
    def backward(ctx: Any, grad_output: Tensor, *_parts: None) -> tuple[Tensor | None, ...]:
        weight, rstd, *parts = ctx.saved_tensors
        if ctx.layout is None:
            return *_fixed_gradients(ctx, grad_output, weight, rstd), None, None, None
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad_output.to(rstd.dtype)
        gamma = None if weight is None else weight.to(rstd.dtype)
        if ctx.from_input:
            mean, *parts = parts
            x_hat = (ctx.layout.unpack(parts, rstd.dtype) - _of_channels(mean, grad)) * _of_channels(rstd, grad)
            scale = rstd if gamma is None else rstd * gamma
            grad_input, grad_weight, grad_bias = batch_norm_gradients(grad, x_hat, scale, ctx.training)
        else:
            grads = packed_batch_norm_gradients(_as_maps(grad), ctx.layout, parts, rstd, gamma, ctx.training)
            grad_input, grad_weight, grad_bias = grads
            grad_input = grad_input if grad.dim() > 2 else grad_input.squeeze(0).t()
        return (
            grad_input.to(ctx.input_dtype) if needs_x else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def _as_maps(x: Tensor) -> Tensor:
    """`x`; of tokens, one map a channel."""
    return x if x.dim() > 2 else x.t().unsqueeze(0).contiguous()


def _of_channels(x: Tensor, like: Tensor) -> Tensor:
    """One number a channel, to be broadcast along the other dimensions of `like`."""
    return x.view(1, -1, *(1,) * (like.dim() - 2))
