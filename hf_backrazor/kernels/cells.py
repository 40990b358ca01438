"""Rows sorted into cells of the real line, and what the cells stand for, by operators of `torch.ops.hf_backrazor`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import check, load, primitive, threads_for
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
        ("bits", _int),
        ("members", _int),
        ("bounds", _pointer),
        ("density", _pointer),
        ("starts", _pointer),
        ("fields", _pointer),
        ("fields_stride", _int),
        ("member", _pointer),
        ("threads", _int),
    )


class _ValuesArgs(ctypes.Structure):
    """`values_args` in native.h."""

    _fields_ = (
        ("rows", _int),
        ("n", _int),
        ("bits", _int),
        ("table", _pointer),
        ("member", _pointer),
        ("fields", _pointer),
        ("fields_stride", _int),
        ("out_dtype", _int),
        ("out", _pointer),
        ("threads", _int),
    )


def _fake_encode_cells(x, bounds, density, starts, bits, code_bytes) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return x.new_empty((rows, code_bytes), dtype=torch.uint8), x.new_empty(rows, dtype=torch.uint8)


def _fake_decode_cells(fields, member, table, n, bits, dtype) -> Tensor:
    return fields.new_empty((fields.shape[0], n), dtype=dtype)


@primitive(
    "encode_cells(Tensor x, Tensor bounds, Tensor density, Tensor starts, int bits, int code_bytes) "
    "-> (Tensor, Tensor)",
    fake=_fake_encode_cells,
)
def encode_cells(
    x: Tensor, bounds: Tensor, density: Tensor, starts: Tensor, bits: int, code_bytes: int
) -> tuple[Tensor, Tensor]:
    """The cell of each element, in the division that fits its row.

    Args:
        x: float32 or bfloat16 `(rows, n)`.
        bounds: float32 `(members - 1,)`, ascending: a row takes the division whose number is how many its mean square
            reaches.
        density: float32 `(members,)`: steps in an interval of length 1.
        starts: uint8 `(members, 2 ** bits)`: the step that each cell begins with, ascending from 0.
        bits: 1 to 4.
        code_bytes: bytes of a row's codes.

    Returns:
        uint8 `(rows, code_bytes)`, the codes; uint8 `(rows,)`, the number of each row's division.
    """
    rows, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    bounds, density, starts = bounds.contiguous(), density.contiguous(), starts.contiguous()
    fields, member = _fake_encode_cells(x, bounds, density, starts, bits, code_bytes)
    arguments = _CellsArgs(
        x=x.data_ptr(),
        x_dtype=DTYPES[x.dtype],
        rows=rows,
        n=n,
        stride=x.stride(0),
        bits=bits,
        members=len(density),
        bounds=bounds.data_ptr(),
        density=density.data_ptr(),
        starts=starts.data_ptr(),
        fields=fields.data_ptr(),
        fields_stride=code_bytes,
        member=member.data_ptr(),
        threads=threads_for(x.numel()),
    )
    check(load().hf_backrazor_encode_cells(ctypes.byref(arguments)))
    return fields, member


@primitive(
    "decode_cells(Tensor fields, Tensor member, Tensor table, int n, int bits, ScalarType dtype) -> Tensor",
    fake=_fake_decode_cells,
)
def decode_cells(fields: Tensor, member: Tensor, table: Tensor, n: int, bits: int, dtype: torch.dtype) -> Tensor:
    """What the cells stand for that `encode_cells` found.

    Args:
        fields: uint8 `(rows, code_bytes)`.
        member: uint8 `(rows,)`.
        table: float32 `(members, 2 ** bits)`: a value for each cell.
        n: elements in a row.
        bits: 1 to 4.
        dtype: float32 or bfloat16.

    Returns:
        `(rows, n)` in `dtype`.
    """
    fields, member, table = fields.contiguous(), member.contiguous(), table.contiguous()
    out = fields.new_empty((fields.shape[0], n), dtype=dtype)
    arguments = _ValuesArgs(
        rows=fields.shape[0],
        n=n,
        bits=bits,
        table=table.data_ptr(),
        member=member.data_ptr(),
        fields=fields.data_ptr(),
        fields_stride=fields.shape[1],
        out_dtype=DTYPES[dtype],
        out=out.data_ptr(),
        threads=threads_for(out.numel()),
    )
    check(load().hf_backrazor_decode_cells(ctypes.byref(arguments)))
    return out
