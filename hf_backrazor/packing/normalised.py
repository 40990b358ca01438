"""Gradients of norms from their packed x_hat.

With g = gamma * dY and means over a row: dX = rstd (g - mean(g) - x_hat mean(g x_hat)), without mean(g) for RMSNorm;
dgamma = sum(dY x_hat); dbeta = sum(dY).
(J. L. Ba et al., "Layer Normalization", 2016; B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019.)

A batch norm takes its means over batch and space instead, for each channel: dX = gamma rstd (dY - mean(dY) - x_hat
mean(dY x_hat)); and with fixed statistics dX = gamma rstd dY.
(S. Ioffe and C. Szegedy, "Batch Normalization", 2015.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.batch_norm import batch_norm_backward
from ..kernels.norm import norm_backward
from .codes import levels_of
from .packed import SparseLayout


def packed_norm_gradients(
    grad: Tensor, layout: SparseLayout, parts: Sequence[Tensor], rstd: Tensor, gamma: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dgamma and dbeta of a norm.

    Args:
        grad: dY, `(rows, n)`, in the dtype of `rstd`.
        layout: of x_hat, `rows * n` elements.
        parts: of x_hat.
        rstd: `(rows, 1)`.
        gamma: `(n,)`, or None: 1.
        centred: LayerNorm; else RMSNorm.

    Returns:
        `(rows, n)`, `(n,)`, `(n,)`.
    """
    if layout.matrix != tuple(grad.shape) or not layout.by_row or not layout.is_compiled(parts, grad.dtype):
        return norm_gradients(grad, layout.unpack(parts, grad.dtype).reshape(grad.shape), rstd, gamma, centred)
    values, index, scale, fields = layout.split(parts)
    spec = layout.spec
    return norm_backward(
        grad,
        rstd,
        gamma,
        centred,
        values,
        index,
        scale,
        fields,
        layout.kept,
        layout.coding,
        spec.bits,
        levels_of(spec.bits, spec.levels) if spec.bits else (),
        spec.rotated,
    )


def norm_gradients(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, gamma: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `packed_norm_gradients`, from a dense `x_hat` `(rows, n)`."""
    products = grad * x_hat
    grad_gamma, grad_beta = products.sum(0), grad.sum(0)
    g, products = (grad, products) if gamma is None else (grad * gamma, products.mul_(gamma))
    grad_input = g - x_hat * products.mean(-1, keepdim=True)
    if centred:
        grad_input -= g.mean(-1, keepdim=True)
    return grad_input.mul_(rstd), grad_gamma, grad_beta


def packed_batch_norm_gradients(
    grad: Tensor,
    layout: SparseLayout,
    parts: Sequence[Tensor],
    rstd: Tensor,
    gamma: Tensor | None,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dgamma and dbeta of a batch norm.

    Args:
        grad: dY, `(batch, channels, *spatial)`, in the dtype of `rstd`.
        layout: of x_hat, with a row for each channel of each sample.
        parts: of x_hat.
        rstd: `(channels,)`.
        gamma: `(channels,)`, or None: 1.
        by_batch: normalised by the statistics of the batch; else by fixed ones.

    Returns:
        As `grad`, `(channels,)`, `(channels,)`.
    """
    scale = rstd if gamma is None else rstd * gamma
    if grad.device.type != "cpu" or not grad.numel() or not layout.by_row or not layout.is_compiled(parts, grad.dtype):
        return batch_norm_gradients(grad, layout.unpack(parts, grad.dtype), scale, by_batch)
    spec = layout.spec
    return batch_norm_backward(
        grad,
        scale,
        by_batch,
        *layout.split(parts),
        layout.kept,
        layout.coding,
        spec.bits,
        levels_of(spec.bits, spec.levels) if spec.bits else (),
        spec.rotated,
    )


def batch_norm_gradients(grad: Tensor, x_hat: Tensor, scale: Tensor, by_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `packed_batch_norm_gradients`, from a dense `x_hat` and `scale`, gamma times rstd."""
    if by_batch:
        # The dense operator's gradient at x_hat, which has mean 0 and deviation 1.
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(), x_hat.contiguous(), scale, None, None, zero, one, True, 0.0, [True, True, True]
        )
    dimensions = [0, *range(2, grad.dim())]
    of_channels = scale.view(1, -1, *(1,) * (grad.dim() - 2))
    return grad * of_channels, (grad * x_hat).sum(dimensions), grad.sum(dimensions)
