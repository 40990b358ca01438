"""Bits of elements between bounds: `torch.ops.hf_backrazor.pack_steps` and `.times_steps`, and what they call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import load, primitive, threads_for
from .rows import DTYPES

_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _StepsArgs(ctypes.Structure):
    """`steps_args` in native.h."""

    _fields_ = (
        ("x", _pointer),
        ("dtype", _int),
        ("numel", _int),
        ("low", _float),
        ("high", _float),
        ("inside", _float),
        ("outside", _float),
        ("bits", _pointer),
        ("out", _pointer),
        ("threads", _int),
    )


def _fake_pack_steps(x: Tensor, low: float, high: float) -> Tensor:
    return x.new_empty((1, -(-x.numel() // 8)), dtype=torch.uint8)


def _fake_times_steps(grad: Tensor, bits: Tensor, inside: float, outside: float) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@primitive(
    "pack_steps(Tensor x, float low, float high) -> Tensor",
    fake=_fake_pack_steps,
    cuda=False,
)
def pack_steps(x: Tensor, low: float, high: float) -> Tensor:
    """Which elements lie between the bounds, or are NaN.

    Args:
        x: float32 or bfloat16, any shape.
        low, high: the bounds; what equals one lies outside. NaN: no bound.

    Returns:
        uint8 `(1, ceil(numel / 8))`.
    """
    x = x.contiguous()
    bits = _fake_pack_steps(x, low, high)
    arguments = _StepsArgs(
        x=x.data_ptr(),
        dtype=DTYPES[x.dtype],
        numel=x.numel(),
        low=low,
        high=high,
        bits=bits.data_ptr(),
        threads=threads_for(x.numel()),
    )
    load().hf_backrazor_pack_steps(ctypes.byref(arguments))
    return bits


@primitive(
    "times_steps(Tensor grad, Tensor bits, float inside, float outside) -> Tensor",
    fake=_fake_times_steps,
    cuda=False,
)
def times_steps(grad: Tensor, bits: Tensor, inside: float, outside: float) -> Tensor:
    """`grad`, float32 or bfloat16, times `inside` where the bit is set, and times `outside` elsewhere (0 gives 0)."""
    grad, bits = grad.contiguous(), bits.contiguous()
    out = torch.empty_like(grad)
    arguments = _StepsArgs(
        x=grad.data_ptr(),
        dtype=DTYPES[grad.dtype],
        numel=grad.numel(),
        inside=inside,
        outside=outside,
        bits=bits.data_ptr(),
        out=out.data_ptr(),
        threads=threads_for(grad.numel()),
    )
    load().hf_backrazor_times_steps(ctypes.byref(arguments))
    return out
