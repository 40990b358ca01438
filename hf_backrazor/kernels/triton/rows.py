"""`pack` and `unpack` of `kernels.rows`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import new_parts, position_bytes, set_strides
from .tiles import (
    CODINGS,
    EXACT,
    MASK,
    OFFSETS,
    POSITIONS,
    rotate_tile,
    rounded,
    store_codes,
    store_fields,
    tile_of,
    unpack_tile,
)


@triton.jit
def select_greatest(x, inside, k: tl.constexpr):
    """Mark the `k` greatest magnitudes of each row; of equal ones, those that come first."""
    # Their order as integers is that of the numbers, with NaN above infinity.
    magnitude = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    # The greatest bound that at least k reach, bit by bit.
    bound = tl.sum(magnitude, 1) * 0
    for i in range(31):
        higher = bound | (1 << (30 - i))
        count = tl.sum((magnitude >= higher[:, None]).to(tl.int32), 1)
        bound = tl.where(count >= k, higher, bound)
    above = magnitude > bound[:, None]
    tied = magnitude == bound[:, None]
    vacant = k - tl.sum(above.to(tl.int32), 1)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= vacant[:, None]))


@triton.jit
def load_sets(x, mean, rstd, centre, size1, size2, stride0, stride1, stride2, group, row, live, column, n):
    """Sets as float32, normalised or centred."""
    inside = live[:, None] & (column < n)[None, :]
    start = (row // size2 // size1).to(tl.int64) * stride0 + (row // size2 % size1).to(tl.int64) * stride1
    start += (row % size2).to(tl.int64) * stride2
    dense = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0).to(tl.float32)
    if mean is not None:
        dense -= tl.load(mean + row, mask=live, other=0)[:, None]
    if rstd is not None:
        dense *= tl.load(rstd + row, mask=live, other=0)[:, None]
    if centre is not None:
        at = centre + (row // group * n)[:, None] + column[None, :]
        dense -= tl.load(at, mask=inside, other=0).to(tl.float32)
    # Beyond the set, there is a mean to be subtracted from nothing.
    return tl.where(inside, rounded(dense, x.dtype.element_ty), 0.0), inside


@triton.jit
def pack_kernel(
    x,
    mean,
    rstd,
    centre,
    values,
    index,
    scale,
    fields,
    sets,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    group,
    index_stride,
    fields_stride,
    n: tl.constexpr,
    k: tl.constexpr,
    CODING: tl.constexpr,
    ENDS: tl.constexpr,
    END_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < sets
    dense, inside = load_sets(
        x, mean, rstd, centre, size1, size2, stride0, stride1, stride2, group, row, live, column, n
    )
    if k > 0:
        keep = select_greatest(dense, inside, k)
        kept = keep.to(tl.int32)
        rank = tl.cumsum(kept, 1) - 1
        store = keep & live[:, None]
        value_dtype: tl.constexpr = values.dtype.element_ty
        tl.store(values + row[:, None] * k + rank, rounded(dense, value_dtype).to(value_dtype), mask=store)
        at = index + row[:, None] * index_stride
        if CODING == MASK:
            store_fields(kept, index, row, live, index_stride, n, 1, ROWS, BLOCK)
        elif CODING == POSITIONS:
            place = tl.broadcast_to(column[None, :], [ROWS, BLOCK])
            tl.store(at + rank, place.to(index.dtype.element_ty), mask=store)
        elif CODING == OFFSETS:
            place = tl.broadcast_to((column % 256)[None, :], [ROWS, BLOCK])
            tl.store(at + ENDS * END_BYTES + rank, place.to(tl.uint8), mask=store)
            ends = tl.cumsum(tl.sum(tl.reshape(kept, [ROWS, BLOCK // 256, 256]), 2), 1)
            block = tl.arange(0, BLOCK // 256)
            for byte in tl.static_range(END_BYTES):
                to = at + block[None, :] * END_BYTES + byte
                some = live[:, None] & (block < ENDS)[None, :]
                tl.store(to, ((ends >> (8 * byte)) & 255).to(tl.uint8), mask=some)
        dense = tl.where(keep, 0.0, dense)
    if BITS > 0:
        if ROTATED:
            dense = rotate_tile(dense, column, n, False)
        magnitude = (dense.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        # In double precision, the order of summation does not show.
        wide = magnitude.to(tl.float64)
        squares = tl.sum(wide * wide, 1)
        if EVEN:
            reach = tl.max(magnitude.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
        else:
            reach = tl.sqrt(squares / (n if ROTATED else n - k)).to(tl.float32)
        reach = rounded(reach, tl.bfloat16)
        codes = (dense < 0).to(tl.int32) << (BITS - 1)
        chosen = tl.zeros(magnitude.shape, tl.float32) + LEVELS[0]
        for j in tl.static_range(2 ** (BITS - 1) - 1):
            over = magnitude > (reach * THRESHOLDS[j])[:, None]
            codes += over.to(tl.int32)
            chosen = tl.where(over, LEVELS[j + 1], chosen)
        row_scale = reach
        if ROTATED:
            products = tl.sum(wide * chosen.to(tl.float64), 1)
            row_scale = tl.where(products == 0, 0.0, squares / products).to(tl.float32)
        tl.store(scale + row, rounded(row_scale, tl.bfloat16).to(tl.bfloat16), mask=live)
        store_codes(tl.where(inside, codes, 0), fields, row, live, fields_stride, n, BITS, ROWS, BLOCK)


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
    """See `kernels.rows.pack`."""
    parts = new_parts(x, n, k, index_bytes, bits, code_bytes, value_dtype)
    values, packed_index, scale, fields = parts
    if (layout := set_strides(x, n)) is None:
        x = x.contiguous()
        layout = set_strides(x, n)
        assert layout is not None
    sizes, strides = layout
    mean, rstd, centre = (None if t is None else t.contiguous() for t in (mean, rstd, centre))
    index, index_stride, ends, end_bytes = index_form(packed_index, n, k, coding)
    sets, tile = x.numel() // n, tile_of(n)
    with torch.cuda.device_of(x):
        pack_kernel[(triton.cdiv(sets, tile["ROWS"]),)](
            x,
            mean,
            rstd,
            centre,
            values,
            index,
            scale,
            fields,
            sets,
            *sizes[1:],
            *strides,
            group,
            index_stride,
            code_bytes,
            n=n,
            k=k,
            CODING=CODINGS[coding],
            ENDS=ends,
            END_BYTES=end_bytes,
            BITS=bits,
            EVEN=even,
            THRESHOLDS=tuple(thresholds),
            LEVELS=tuple(levels),
            ROTATED=rotated,
            **tile,
            **EXACT,
        )
    return parts


@triton.jit
def unpack_kernel(
    out,
    values,
    index,
    scale,
    fields,
    centre,
    group,
    first,
    rows,
    index_stride,
    fields_stride,
    n: tl.constexpr,
    k: tl.constexpr,
    CODING: tl.constexpr,
    ENDS: tl.constexpr,
    END_BYTES: tl.constexpr,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROTATED: tl.constexpr,
    KEEP_BASE: tl.constexpr,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unpack_tile(
        out,
        values,
        index,
        scale,
        fields,
        centre,
        group,
        first,
        row,
        row < rows,
        index_stride,
        fields_stride,
        n,
        k,
        CODING,
        ENDS,
        END_BYTES,
        KEPT,
        BITS,
        LEVELS,
        ROTATED,
        KEEP_BASE,
        SIGN,
        BLOCK,
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
    """See `kernels.rows.unpack`."""
    source = next(part for part in (values, fields, base) if part is not None)
    out = source.new_empty((rows, n), dtype=dtype) if base is None else base.clone()
    _write_rows(
        out,
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
        base is not None,
        0,
    )
    if gain is not None:
        out.mul_(gain.unsqueeze(-1))
    if offset is not None:
        out.add_(offset.unsqueeze(-1))
    return out if (low, high) == (-inf, inf) else out.clamp_(low, high)


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
    """See `kernels.rows.accumulate`."""
    _write_rows(
        into, values, index, scale, fields, centre, group, first, rows, n, k, coding, bits, levels, rotated, False, sign
    )


def _write_rows(
    out: Tensor,
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
    keep_base: bool,
    sign: int,
) -> None:
    values, index, scale, fields, centre = (
        None if t is None else t.contiguous() for t in (values, index, scale, fields, centre)
    )
    index, index_stride, ends, end_bytes = index_form(index, n, k, coding)
    tile = tile_of(n)
    with torch.cuda.device_of(out):
        unpack_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            out,
            values,
            index,
            scale,
            fields,
            centre,
            group,
            first,
            rows,
            index_stride,
            0 if fields is None else fields.shape[-1],
            n=n,
            k=k,
            CODING=CODINGS[coding],
            ENDS=ends,
            END_BYTES=end_bytes,
            KEPT=triton.next_power_of_2(max(k, 1)),
            BITS=bits,
            LEVELS=tuple(levels),
            ROTATED=rotated,
            KEEP_BASE=keep_base,
            SIGN=sign,
            **tile,
            **EXACT,
        )


def index_form(index: Tensor | None, n: int, k: int, coding: str) -> tuple[Tensor | None, int, int, int]:
    """An index as kernels read it: of integers, their number in a row; blocks whose end is stored, bytes of an end."""
    if index is None or not k:
        return index, 0, 0, 0
    if coding == "positions":
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[position_bytes(n)]
        return index.view(integers), k, 0, 0
    ends = (n - 1) // 256 if coding == "offsets" else 0
    return index, index.shape[-1], ends, position_bytes(k + 1)
