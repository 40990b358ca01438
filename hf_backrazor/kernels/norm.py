"""Gradients of LayerNorm and RMSNorm from a packed x_hat: `torch.ops.hf_backrazor.norm_backward`, and what it calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import check, load, primitive, threads_for
from .rows import UnpackArgs, address, unpack_arguments

_int, _pointer = ctypes.c_int64, ctypes.c_void_p

# Rows whose share of dgamma and dbeta is summed by itself: the order of summation does not depend on threads.
BLOCK = 64


class _NormArgs(ctypes.Structure):
    """`norm_args` in native.h."""

    _fields_ = (
        ("x_hat", UnpackArgs),
        ("grad", _pointer),
        ("rstd", _pointer),
        ("gamma", _pointer),
        ("centred", _int),
        ("block", _int),
        ("grad_input", _pointer),
        ("grad_gamma", _pointer),
        ("grad_beta", _pointer),
        ("threads", _int),
    )


def _fake_norm_backward(
    grad, rstd, gamma, centred, values, index, scale, fields, k, coding, bits, levels, rotated
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), grad.new_empty(grad.shape[1]), grad.new_empty(grad.shape[1])


@primitive(
    "norm_backward(Tensor grad, Tensor rstd, Tensor? gamma, bool centred, Tensor? values, Tensor? index, "
    "Tensor? scale, Tensor? fields, int k, str coding, int bits, float[] levels, bool rotated) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_norm_backward,
)
def norm_backward(
    grad: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    centred: bool,
    values: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    fields: Tensor | None,
    k: int,
    coding: str,
    bits: int,
    levels: Sequence[float],
    rotated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dgamma and dbeta.

    Args:
        grad: dY, float32 `(rows, n)`.
        rstd: float32, a number for each row.
        gamma: float32 `(n,)`, or None: 1.
        centred: LayerNorm; else RMSNorm.
        values, index, scale, fields, k, coding, bits, levels, rotated: the packed x_hat (see `rows.unpack`).

    Returns:
        float32 `(rows, n)`, `(n,)`, `(n,)`.
    """
    rows, n = grad.shape
    grad, rstd, gamma = grad.contiguous(), rstd.contiguous(), None if gamma is None else gamma.contiguous()
    x_hat, _used = unpack_arguments(values, index, scale, fields, None, 1, 0, rows, n, k, coding, bits, levels, rotated)
    grad_input = torch.empty_like(grad)
    sums = grad.new_empty(2, -(-rows // BLOCK), n)
    arguments = _NormArgs(
        x_hat=x_hat,
        grad=grad.data_ptr(),
        rstd=rstd.data_ptr(),
        gamma=address(gamma),
        centred=centred,
        block=BLOCK,
        grad_input=grad_input.data_ptr(),
        grad_gamma=sums[0].data_ptr(),
        grad_beta=sums[1].data_ptr(),
        threads=threads_for(grad.numel()),
    )
    check(load().hf_backrazor_norm(ctypes.byref(arguments)))
    grad_gamma, grad_beta = sums.sum(1).unbind()
    return grad_input, grad_gamma.clone(), grad_beta.clone()
