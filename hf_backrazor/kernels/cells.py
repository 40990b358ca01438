"""Elements sorted into cells of the real line: `torch.ops.hf_backrazor.encode_cells`, and what it calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import check, load, on_cuda, threads_for
from .rows import DTYPES

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _CellsArgs(ctypes.Structure):
    """`cells_args` in native.h."""

    _fields_ = (
        ("x", _pointer),
        ("x_dtype", _int),
        ("rows", _int),
        ("n", _int),
        ("stride", _int),
        ("reach", ctypes.c_float),
        ("steps_per_unit", ctypes.c_float),
        ("bits", _int),
        ("starts", _pointer),
        ("fields", _pointer),
        ("fields_stride", _int),
        ("threads", _int),
    )


def encode_cells(
    x: Tensor, reach: float, steps_per_unit: float, bits: int, starts: Sequence[int], code_bytes: int
) -> Tensor:
    """The cell of each element.

    Args:
        x: float32 or bfloat16 `(rows, n)`.
        reach: steps lie evenly between `-reach` and `reach`.
        steps_per_unit: steps in an interval of length 1.
        bits: 1 to 4.
        starts: the step that each of the `2 ** bits` cells begins with, ascending from 0.
        code_bytes: bytes of a row's codes.

    Returns:
        uint8 `(rows, code_bytes)`.
    """
    rows, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    fields = x.new_empty((rows, code_bytes), dtype=torch.uint8)
    table = (ctypes.c_uint8 * 16)(*starts)
    arguments = _CellsArgs(
        x=x.data_ptr(),
        x_dtype=DTYPES[x.dtype],
        rows=rows,
        n=n,
        stride=x.stride(0),
        reach=reach,
        steps_per_unit=steps_per_unit,
        bits=bits,
        starts=ctypes.addressof(table),
        fields=fields.data_ptr(),
        fields_stride=code_bytes,
        threads=threads_for(x.numel()),
    )
    check(load().hf_backrazor_encode_cells(ctypes.byref(arguments)))
    return fields


def _fake_encode_cells(x, reach, steps_per_unit, bits, starts, code_bytes) -> Tensor:
    return x.new_empty((x.shape[0], code_bytes), dtype=torch.uint8)


_operators = torch.library.Library("hf_backrazor", "FRAGMENT")
_operators.define(
    "encode_cells(Tensor x, float reach, float steps_per_unit, int bits, int[] starts, int code_bytes) -> Tensor"
)
_operators.impl("encode_cells", encode_cells, "CPU")
_operators.impl("encode_cells", on_cuda("cells", "encode_cells"), "CUDA")
torch.library.register_fake("hf_backrazor::encode_cells", _fake_encode_cells)
