"""Gradients of LayerNorm and RMSNorm from their packed x_hat.

With g = gamma * dY and means over a row: dX = rstd (g - mean(g) - x_hat mean(g x_hat)), without mean(g) for RMSNorm;
dgamma = sum(dY x_hat); dbeta = sum(dY).
(J. L. Ba et al., "Layer Normalization", 2016; B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import norm as _  # noqa: F401  registers the operator
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
        return norm_gradients(grad, layout.unpack(parts, grad.dtype).view(grad.shape), rstd, gamma, centred)
    values, index, scale, fields = layout.split(parts)
    spec = layout.spec
    return torch.ops.hf_backrazor.norm_backward(
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
