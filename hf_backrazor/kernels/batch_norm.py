"""Gradients of batch norms from a packed x_hat: `torch.ops.hf_backrazor.batch_norm_backward`, and what it calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import check, load, primitive, threads_for
from .rows import UnpackArgs, address, unpack_arguments

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _BatchNormArgs(ctypes.Structure):
    """`batch_norm_args` in native.h."""

    _fields_ = (
        ("x_hat", UnpackArgs),
        ("grad", _pointer),
        ("scale", _pointer),
        ("batch", _int),
        ("channels", _int),
        ("by_batch", _int),
        ("grad_input", _pointer),
        ("grad_gamma", _pointer),
        ("grad_beta", _pointer),
        ("threads", _int),
    )


def _fake_batch_norm_backward(grad: Tensor, gamma_rstd: Tensor, *_others: object) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad_input, torch.empty_like(gamma_rstd), torch.empty_like(gamma_rstd)


@primitive(
    "batch_norm_backward(Tensor grad, Tensor gamma_rstd, bool by_batch, Tensor? values, Tensor? index, "
    "Tensor? scale, Tensor? fields, int k, str coding, int bits, float[] levels, bool rotated) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_batch_norm_backward,
    cuda=False,
)
def batch_norm_backward(
    grad: Tensor,
    gamma_rstd: Tensor,
    by_batch: bool,
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
        grad: dY, float32 `(batch, channels, ...)`.
        gamma_rstd: float32 `(channels,)`: gamma over the deviation.
        by_batch: normalised by the statistics of the batch; else by fixed ones.
        values, index, scale, fields, k, coding, bits, levels, rotated: the packed x_hat (see `rows.unpack`), with a row
            for each channel of each sample.

    Returns:
        float32: as `grad`, `(channels,)`, `(channels,)`.
    """
    grad, gamma_rstd = grad.contiguous(), gamma_rstd.contiguous()
    batch, channels = grad.shape[:2]
    n = grad.numel() // (batch * channels)
    x_hat, _used = unpack_arguments(
        values, index, scale, fields, None, 1, 0, batch * channels, n, k, coding, bits, levels, rotated
    )
    grad_input, grad_gamma, grad_beta = _fake_batch_norm_backward(grad, gamma_rstd)
    arguments = _BatchNormArgs(
        x_hat=x_hat,
        grad=grad.data_ptr(),
        scale=address(gamma_rstd),
        batch=batch,
        channels=channels,
        by_batch=by_batch,
        grad_input=grad_input.data_ptr(),
        grad_gamma=grad_gamma.data_ptr(),
        grad_beta=grad_beta.data_ptr(),
        threads=threads_for(grad.numel()),
    )
    check(load().hf_backrazor_batch_norm(ctypes.byref(arguments)))
    return grad_input, grad_gamma, grad_beta
