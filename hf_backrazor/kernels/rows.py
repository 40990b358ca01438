"""Rows packed and unpacked in one pass: `torch.ops.hf_backrazor.pack` and `.unpack`, and what they call in the library.

As operators of torch they have names in profiles and traces, and run on fake tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from .library import available, check, load, primitive, threads_for, triton_available

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODINGS = {"none": 0, "mask": 1, "positions": 2, "offsets": 3}

# Elements of a set that one block of a GPU's threads holds in its registers.
TRITON_LIMIT = 16384

_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_Triple = _int * 3
_Sixteen = _float * 16


class _PackArgs(ctypes.Structure):
    """`pack_args` in native.h."""

    _fields_ = (
        ("x", _pointer),
        ("x_dtype", _int),
        ("sizes", _Triple),
        ("strides", _Triple),
        ("n", _int),
        ("mean", _pointer),
        ("rstd", _pointer),
        ("centre", _pointer),
        ("group", _int),
        ("k", _int),
        ("coding", _int),
        ("value_dtype", _int),
        ("values", _pointer),
        ("index", _pointer),
        ("index_stride", _int),
        ("bits", _int),
        ("even", _int),
        ("thresholds", _pointer),
        ("levels", _pointer),
        ("rotated", _int),
        ("scale", _pointer),
        ("fields", _pointer),
        ("fields_stride", _int),
        ("threads", _int),
    )


class UnpackArgs(ctypes.Structure):
    """`unpack_args` in native.h."""

    _fields_ = (
        ("rows", _int),
        ("n", _int),
        ("bits", _int),
        ("levels", _pointer),
        ("rotated", _int),
        ("scale", _pointer),
        ("fields", _pointer),
        ("fields_stride", _int),
        ("k", _int),
        ("coding", _int),
        ("value_dtype", _int),
        ("values", _pointer),
        ("index", _pointer),
        ("index_stride", _int),
        ("centre", _pointer),
        ("group", _int),
        ("first", _int),
        ("gain", _pointer),
        ("offset", _pointer),
        ("low", _float),
        ("high", _float),
        ("keep_base", _int),
        ("out_dtype", _int),
        ("accumulate", _int),
        ("out", _pointer),
        ("threads", _int),
    )


def handles(device: str, n: int, bits: int, dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether primitives for a type of device are there, and know such tensors.

    Args:
        device: type of the device.
        n: elements in a set.
        bits: of the codes.
        dtype: of the dense tensor.
        value_dtype: of kept values.
    """
    if n == 0 or bits > 4 or dtype not in DTYPES or value_dtype not in DTYPES:
        return False
    if device == "cuda":
        return n <= TRITON_LIMIT and triton_available()
    if device != "cpu" or dtype == torch.float16 or not available():
        return False
    return value_dtype != torch.float16 or bool(load().hf_backrazor_has_float16())


def _fake_pack(
    x: Tensor,
    mean,
    rstd,
    centre,
    group,
    n,
    k,
    coding,
    index_bytes,
    bits,
    code_bytes,
    even,
    thresholds,
    levels,
    rotated,
    value_dtype,
) -> list[Tensor]:
    return new_parts(x, n, k, index_bytes, bits, code_bytes, value_dtype)


def _fake_unpack(
    values,
    index,
    scale,
    fields,
    centre,
    group,
    first,
    rows,
    n,
    k,
    coding,
    bits,
    levels,
    rotated,
    base,
    gain,
    offset,
    low,
    high,
    dtype,
) -> Tensor:
    source = next(part for part in (values, fields, base) if part is not None)
    return source.new_empty((rows, n), dtype=dtype)


@primitive(
    "pack(Tensor x, Tensor? mean, Tensor? rstd, Tensor? centre, int group, int n, int k, str coding, int index_bytes, "
    "int bits, int code_bytes, bool even, float[] thresholds, float[] levels, bool rotated, "
    "ScalarType value_dtype) -> Tensor[]",
    fake=_fake_pack,
)
def pack(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    centre: Tensor | None,
    group: int,
    n: int,
    k: int,
    coding: str,
    index_bytes: int,
    bits: int,
    code_bytes: int,
    even: bool,
    thresholds: Sequence[float],
    levels: Sequence[float],
    rotated: bool,
    value_dtype: torch.dtype,
) -> list[Tensor]:
    """Keep the `k` greatest magnitudes of each set, and code the rest; all in one pass.

    Args:
        x: float32 or bfloat16, seen as sets of `n` consecutive elements; with codes, a set is a row.
        mean, rstd: float32, a number for each set: (x - mean) rstd is packed. Or None.
        centre: bfloat16 `(sets / group, n)`: subtracted. Or None.
        group: consecutive sets that share a centre.
        n: elements in a set.
        k: how many are kept, below `n`.
        coding: of their places (see `packing.index`).
        index_bytes: bytes of a set's index.
        bits: of the codes, 0 to 4.
        code_bytes: bytes of a set's codes.
        even: whether levels are even, and chosen at the greatest magnitude; else at the root mean square.
        thresholds: between the positive levels.
        levels: the positive ones.
        rotated: whether what is left is turned before it is coded.
        value_dtype: of kept values.

    Returns:
        Kept values `(sets, k)`, index uint8 `(sets, index_bytes)`, scale bfloat16 `(sets, 1)`, codes uint8 `(sets,
        code_bytes)`; without elements where nothing is kept, or nothing coded.
    """
    parts = new_parts(x, n, k, index_bytes, bits, code_bytes, value_dtype)
    values, index, scale, fields = parts
    if (layout := set_strides(x, n)) is None:
        x = x.contiguous()
        layout = set_strides(x, n)
        assert layout is not None
    sizes, strides = layout
    mean, rstd, centre = (None if t is None else t.contiguous() for t in (mean, rstd, centre))
    table, positive = float_array(tuple(thresholds)), float_array(tuple(levels))
    arguments = _PackArgs(
        x=x.data_ptr(),
        x_dtype=DTYPES[x.dtype],
        sizes=_Triple(*sizes),
        strides=_Triple(*strides),
        n=n,
        mean=address(mean),
        rstd=address(rstd),
        centre=address(centre),
        group=group,
        k=k,
        coding=CODINGS[coding],
        value_dtype=DTYPES[value_dtype],
        values=values.data_ptr(),
        index=index.data_ptr(),
        index_stride=index_bytes,
        bits=bits,
        even=even,
        thresholds=ctypes.addressof(table),
        levels=ctypes.addressof(positive),
        rotated=rotated,
        scale=scale.data_ptr(),
        fields=fields.data_ptr(),
        fields_stride=code_bytes,
        threads=threads_for(x.numel()),
    )
    check(load().hf_backrazor_pack(ctypes.byref(arguments)))
    return parts


def new_parts(
    x: Tensor, n: int, k: int, index_bytes: int, bits: int, code_bytes: int, value_dtype: torch.dtype
) -> list[Tensor]:
    sets = x.numel() // n
    return [
        x.new_empty((sets, k), dtype=value_dtype),
        x.new_empty((sets, index_bytes if k else 0), dtype=torch.uint8),
        x.new_empty((sets, 1 if bits else 0), dtype=torch.bfloat16),
        x.new_empty((sets, code_bytes if bits else 0), dtype=torch.uint8),
    ]


def set_strides(x: Tensor, n: int) -> tuple[list[int], list[int]] | None:
    """Sizes and strides of three dimensions that run over the sets of `n` elements of `x`; None if there are none."""
    if x.is_contiguous():
        return [1, 1, x.numel() // n], [0, 0, n]
    if x.dim() > 4 or x.shape[-1] != n or x.stride(-1) != 1:
        return None
    missing = 4 - x.dim()
    return [1] * missing + list(x.shape[:-1]), [0] * missing + list(x.stride()[:-1])


def position_bytes(n: int) -> int:
    """Bytes in which positions up to `n - 1` are counted (see `packing.index`)."""
    return 1 if n <= 256 else 2 if n <= 32768 else 4


@primitive(
    "unpack(Tensor? values, Tensor? index, Tensor? scale, Tensor? fields, Tensor? centre, int group, int first, "
    "int rows, int n, int k, str coding, int bits, float[] levels, bool rotated, Tensor? base, Tensor? gain, "
    "Tensor? offset, float low, float high, ScalarType dtype) -> Tensor",
    fake=_fake_unpack,
)
def unpack(
    values: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    fields: Tensor | None,
    centre: Tensor | None,
    group: int,
    first: int,
    rows: int,
    n: int,
    k: int,
    coding: str,
    bits: int,
    levels: Sequence[float],
    rotated: bool,
    base: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rows that `pack` packed; of each element x, gain x + offset, limited.

    Args:
        values, index, scale, fields: what `pack` returned, or rows of it; None where it has no elements. Without a
            scale, it is 1.
        centre, group: as for `pack`.
        first: the place of the first row among the sets that `centre` is for.
        rows, n: of the result.
        k, coding, bits: as for `pack`.
        levels: what each code stands for at a scale of 1.
        rotated: as for `pack`.
        base: `(rows, n)` in `dtype`: what elements stand for that are neither kept nor coded. None: zero.
        gain, offset: float32, a number for each row; or None: 1 and 0.
        low, high: limits of the result, infinite for none.
        dtype: float32 or bfloat16.

    Returns:
        `(rows, n)` in `dtype`.
    """
    source = next(part for part in (values, fields, base) if part is not None)
    out = source.new_empty((rows, n), dtype=dtype) if base is None else base.clone()
    arguments, _used = unpack_arguments(
        values, index, scale, fields, centre, group, first, rows, n, k, coding, bits, levels, rotated
    )
    gain, offset = (None if t is None else t.contiguous() for t in (gain, offset))
    arguments.gain, arguments.offset = address(gain), address(offset)
    arguments.low, arguments.high = low, high
    arguments.keep_base = base is not None
    arguments.out_dtype = DTYPES[dtype]
    arguments.out = out.data_ptr()
    arguments.threads = threads_for(out.numel())
    check(load().hf_backrazor_unpack(ctypes.byref(arguments)))
    return out


@primitive(
    "accumulate(Tensor(a!) into, Tensor? values, Tensor? index, Tensor? scale, Tensor? fields, Tensor? centre, "
    "int group, int first, int rows, int n, int k, str coding, int bits, float[] levels, bool rotated, int sign) -> ()",
    fake=lambda *_arguments: None,
)
def accumulate(
    into: Tensor,
    values: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    fields: Tensor | None,
    centre: Tensor | None,
    group: int,
    first: int,
    rows: int,
    n: int,
    k: int,
    coding: str,
    bits: int,
    levels: Sequence[float],
    rotated: bool,
    sign: int,
) -> None:
    """Add rows that `pack` packed to others, or subtract them, in place.

    Args:
        into: float32, contiguous, `rows * n` elements.
        values, index, scale, fields, centre, group, first, rows, n, k, coding, bits, levels, rotated: see `unpack`.
        sign: 1 or -1.
    """
    arguments, _used = unpack_arguments(
        values, index, scale, fields, centre, group, first, rows, n, k, coding, bits, levels, rotated
    )
    arguments.accumulate = sign
    arguments.out_dtype = DTYPES[into.dtype]
    arguments.out = into.data_ptr()
    arguments.threads = threads_for(into.numel())
    check(load().hf_backrazor_unpack(ctypes.byref(arguments)))


def unpack_arguments(
    values: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    fields: Tensor | None,
    centre: Tensor | None,
    group: int,
    first: int,
    rows: int,
    n: int,
    k: int,
    coding: str,
    bits: int,
    levels: Sequence[float],
    rotated: bool,
) -> tuple[UnpackArgs, object]:
    """What says how rows are read (see `unpack`), and what has to live while it is used."""
    values, index, scale, fields, centre = (
        None if t is None else t.contiguous() for t in (values, index, scale, fields, centre)
    )
    table = float_array(tuple(levels))
    arguments = UnpackArgs(
        rows=rows,
        n=n,
        bits=bits,
        levels=ctypes.addressof(table),
        rotated=rotated,
        scale=address(scale),
        fields=address(fields),
        fields_stride=0 if fields is None else fields.shape[-1],
        k=k,
        coding=CODINGS[coding],
        value_dtype=0 if values is None else DTYPES[values.dtype],
        values=address(values),
        index=address(index),
        index_stride=0 if index is None else index.shape[-1],
        centre=address(centre),
        group=group,
        first=first,
        low=-inf,
        high=inf,
    )
    return arguments, (values, index, scale, fields, centre, table)


@lru_cache(maxsize=256)
def float_array(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_float]:
    """Up to sixteen numbers as C reads them, zeros behind them. One array for all that ask; not to be written to."""
    return _Sixteen(*values)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
