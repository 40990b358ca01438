"""LayerNorm and RMSNorm: the normalised output (or, as in the paper, the input) packed; dbeta exact.

For the formulas see `packing.normalised`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..packing import Packed, PackSpec, norm_gradients, pack, packed_norm_gradients, sparse_layout
from .differentiation import replayed, replayed_gradients, restored, saved_parts
from .precision import accumulate_dtype
from .sharing import note_affine, pack_shared


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spec: PackSpec,
    stores: str = "x_hat",
) -> Tensor:
    """`torch.nn.functional.layer_norm` with x_hat or x packed.

    Args:
        x: `(..., *normalized_shape)`, float.
        normalized_shape: trailing dimensions that mean and variance are taken over.
        weight: gamma, of `normalized_shape`, or None.
        bias: beta, of `normalized_shape`, or None.
        eps: added to the variance.
        spec: how the stored tensor is packed.
        stores: `"x_hat"` or `"input"`.

    Returns:
        As `x`, bit-equal to the dense operator's.
    """
    if stores == "input":
        return _LayerNorm.apply(x, weight, bias, tuple(normalized_shape), eps, spec, pack_shared(x, spec))
    y, *parts = _LayerNorm.apply(x, weight, bias, tuple(normalized_shape), eps, spec, None)
    if len(normalized_shape) == 1:
        note_affine(y, sparse_layout(x.shape, x.dtype, spec), parts, weight, bias)
    return y


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    spec: PackSpec,
    stores: str = "x_hat",
    offset: float = 0.0,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """RMSNorm over the last dimension, y = x rsqrt(mean(x^2) + eps) (weight + offset), with x_hat or x packed.

    Args:
        x: `(..., n)`, float.
        weight: `(n,)` or None.
        eps: added to the mean square; None: the machine epsilon of float32, or of the dtype of `x` if that is wider.
        spec: how the stored tensor is packed.
        stores: `"x_hat"` or `"input"`.
        offset: added to the weight (1 for Gemma's norms).
        forward: computes y; the many RMSNorms of Transformers cast and round in their own ways, and the result has to
            be theirs to the bit. Default: `torch.nn.functional.rms_norm`.

    Returns:
        As `forward(x)`.
    """
    if stores == "input":
        packed = pack_shared(x, spec)
        cast = forward is not None and x.dtype != torch.float32
        if packed.layout.whole and (cast or not x.requires_grad):
            # Where dense saves something else, `x` may be changed later: norms of Transformers save what they cast to
            # float32, and without a gradient for `x` its normalised output is enough.
            packed = Packed(packed.layout, (x.detach().clone(),))
        return _RMSNorm.apply(x, weight, eps, spec, packed, offset, forward)
    y, *parts = _RMSNorm.apply(x, weight, eps, spec, None, offset, forward)
    gamma = weight if weight is None or not offset else weight.detach() + offset
    note_affine(y, sparse_layout(x.shape, x.dtype, spec), parts, gamma, None)
    return y


def _replay_layer_norm(ctx: Any, grad_output: Tensor, *_parts: None) -> Any:
    if not ctx.from_input:
        return NotImplemented
    weight, _, _, *parts = ctx.saved_tensors

    def plain(x: Tensor, weight: Tensor | None) -> Tensor:
        return torch.nn.functional.layer_norm(x, ctx.normalized_shape, weight, None, ctx.eps)

    x = restored(ctx.layout, parts, constant=not ctx.needs_input_grad[0])
    grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_bias = grad_output.sum_to_size(ctx.normalized_shape).to(ctx.bias_dtype)
    return *replayed_gradients(plain, (x, weight), grad_output), grad_bias, None, None, None, None


def _replay_rms_norm(ctx: Any, grad_output: Tensor, *_parts: None) -> Any:
    if not ctx.from_input:
        return NotImplemented
    weight, _, *parts = ctx.saved_tensors

    def plain(x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.to(accumulate_dtype(x))
        x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        y = x_hat if weight is None else x_hat * (weight.to(wide.dtype) + ctx.offset)
        return y.to(grad_output.dtype)

    x = restored(ctx.layout, parts, constant=not ctx.needs_input_grad[0])
    return *replayed_gradients(plain, (x, weight), grad_output), None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: tuple[int, ...],
        eps: float,
        spec: PackSpec,
        packed_input: Packed | None,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
        # On a CPU they come in the dtype of a 16-bit x.
        mean, rstd = mean.to(accumulate_dtype(x)), rstd.to(accumulate_dtype(x))
        ctx.from_input = packed_input is not None
        ctx.normalized_shape, ctx.eps = normalized_shape, eps
        ctx.input_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if packed_input is not None:
            ctx.layout = packed_input.layout
            ctx.save_for_backward(weight, rstd, mean, *saved_parts(x, packed_input))
            return y
        if len(normalized_shape) == 1:
            packed = pack(x, spec, mean, rstd)
        else:
            packed = pack((x.to(mean.dtype) - mean).mul_(rstd).to(x.dtype), spec)
        ctx.layout = packed.layout
        ctx.save_for_backward(weight, rstd, *packed.parts)
        ctx.mark_non_differentiable(*packed.parts)
        return y, *packed.parts

    @staticmethod
    @replayed(_replay_layer_norm)
    def backward(ctx: Any, grad_output: Tensor, *_parts: None) -> tuple[Tensor | None, ...]:
        weight, rstd, *parts = ctx.saved_tensors
        size = prod(ctx.normalized_shape)
        grad_rows, rstd = grad_output.to(rstd.dtype).reshape(-1, size), rstd.view(-1, 1)
        gamma = None if weight is None else weight.to(rstd.dtype).reshape(size)
        if ctx.from_input:
            mean, *parts = parts
            x_hat = (ctx.layout.unpack(parts, rstd.dtype).reshape(-1, size) - mean.view(-1, 1)) * rstd
            grads = norm_gradients(grad_rows, x_hat, rstd, gamma, centred=True)
        else:
            grads = packed_norm_gradients(grad_rows, ctx.layout, parts, rstd, gamma, centred=True)
        grad_input = grads[0].reshape(grad_output.shape).to(ctx.input_dtype)
        grad_weight = grads[1].view(weight.shape).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grads[2].view(ctx.normalized_shape).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        eps: float | None,
        spec: PackSpec,
        packed_input: Packed | None,
        offset: float,
        forward: Callable[[Tensor], Tensor] | None,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps) if forward is None else forward(x)
        ctx.from_input = packed_input is not None
        ctx.input_dtype = x.dtype
        wide = x.to(accumulate_dtype(x))
        # torch 2.13 takes the epsilon of the dtype that it computes in.
        eps = torch.finfo(wide.dtype).eps if eps is None else eps
        ctx.offset, ctx.eps = offset, eps
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        packed = packed_input or pack(x, spec, rstd=rstd)
        ctx.layout = packed.layout
        ctx.save_for_backward(weight, rstd, *(packed.parts if packed_input is None else saved_parts(x, packed)))
        if packed_input is not None:
            return y
        ctx.mark_non_differentiable(*packed.parts)
        return y, *packed.parts

    @staticmethod
    @replayed(_replay_rms_norm)
    def backward(ctx: Any, grad_output: Tensor, *_parts: None) -> tuple[Tensor | None, ...]:
        weight, rstd, *parts = ctx.saved_tensors
        size = grad_output.shape[-1]
        grad_rows, rstd = grad_output.to(rstd.dtype).reshape(-1, size), rstd.view(-1, 1)
        gamma = None if weight is None else weight.to(rstd.dtype) + ctx.offset
        if ctx.from_input:
            x_hat = ctx.layout.unpack(parts, rstd.dtype).reshape(-1, size) * rstd
            grads = norm_gradients(grad_rows, x_hat, rstd, gamma, centred=False)
        else:
            grads = packed_norm_gradients(grad_rows, ctx.layout, parts, rstd, gamma, centred=False)
        grad_input = grads[0].reshape(grad_output.shape).to(ctx.input_dtype)
        grad_weight = grads[1].to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, None, None, None, None, None
