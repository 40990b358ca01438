"""`encode_cells` and `decode_cells` of `kernels.cells`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import EXACT, load_codes, look_up_by_row, rounded, store_codes, tile_of


@triton.jit
def encode_cells_kernel(
    x,
    bounds,
    density,
    starts,
    fields,
    member,
    rows,
    members,
    stride,
    fields_stride,
    n: tl.constexpr,
    BITS: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (column < n)[None, :]
    dense = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0).to(tl.float32)
    # In double precision, the order of summation does not show.
    wide = dense.to(tl.float64)
    square = (tl.sum(wide * wide, 1) / n).to(tl.float32)
    place = tl.arange(0, MEMBERS)
    bound = tl.load(bounds + place, mask=place < members - 1, other=0)
    passed = (square[:, None] >= bound[None, :]) & (place < members - 1)[None, :]
    fitting = tl.sum(passed.to(tl.int32), 1)
    tl.store(member + row, fitting.to(tl.uint8), mask=live)
    step = dense * tl.load(density + fitting)[:, None] + 128.0
    # Not a number is 0, too.
    step = tl.where(step > 0, step, 0.0)
    step = tl.where(step < 255, step, 255.0).to(tl.int32)
    codes = tl.zeros(step.shape, tl.int32)
    for cell in tl.static_range(1, 2**BITS):
        codes += (step >= tl.load(starts + (fitting << BITS) + cell).to(tl.int32)[:, None]).to(tl.int32)
    store_codes(tl.where(inside, codes, 0), fields, row, live, fields_stride, n, BITS, ROWS, BLOCK)


def encode_cells(
    x: Tensor, bounds: Tensor, density: Tensor, starts: Tensor, bits: int, code_bytes: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.cells.encode_cells`."""
    rows, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    fields, member = x.new_empty((rows, code_bytes), dtype=torch.uint8), x.new_empty(rows, dtype=torch.uint8)
    tile = tile_of(n)
    with torch.cuda.device_of(x):
        encode_cells_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x,
            bounds.contiguous(),
            density.contiguous(),
            starts.contiguous(),
            fields,
            member,
            rows,
            len(density),
            x.stride(0),
            code_bytes,
            n=n,
            BITS=bits,
            MEMBERS=triton.next_power_of_2(len(density)),
            **tile,
            **EXACT,
        )
    return fields, member


@triton.jit
def decode_cells_kernel(
    out,
    fields,
    member,
    table,
    rows,
    fields_stride,
    n: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (column < n)[None, :]
    codes = load_codes(fields, row, column, inside, fields_stride, n, BITS)
    x = look_up_by_row(codes, table, member, row, live, inside, BITS)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + row.to(tl.int64)[:, None] * n + column[None, :], rounded(x, dtype).to(dtype), mask=inside)


def decode_cells(fields: Tensor, member: Tensor, table: Tensor, n: int, bits: int, dtype: torch.dtype) -> Tensor:
    """See `kernels.cells.decode_cells`."""
    fields, rows, tile = fields.contiguous(), fields.shape[0], tile_of(n)
    out = fields.new_empty((rows, n), dtype=dtype)
    with torch.cuda.device_of(out):
        decode_cells_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            out,
            fields,
            member.contiguous(),
            table.contiguous(),
            rows,
            fields.shape[1],
            n=n,
            BITS=bits,
            **tile,
            **EXACT,
        )
    return out
