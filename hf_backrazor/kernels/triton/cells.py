"""`encode_cells` of `kernels.cells`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import EXACT, store_codes, tile_of


@triton.jit
def encode_cells_kernel(
    x,
    fields,
    rows,
    stride,
    fields_stride,
    reach,
    steps_per_unit,
    n: tl.constexpr,
    BITS: tl.constexpr,
    STARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (column < n)[None, :]
    dense = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0).to(tl.float32)
    step = (dense + reach) * steps_per_unit
    # Not a number is 0, too.
    step = tl.where(step > 0, step, 0.0)
    step = tl.where(step < 255, step, 255.0).to(tl.int32)
    codes = tl.zeros(step.shape, tl.int32)
    for cell in tl.static_range(1, 2**BITS):
        codes += (step >= STARTS[cell]).to(tl.int32)
    store_codes(tl.where(inside, codes, 0), fields, row, live, fields_stride, n, BITS, ROWS, BLOCK)


def encode_cells(
    x: Tensor, reach: float, steps_per_unit: float, bits: int, starts: Sequence[int], code_bytes: int
) -> Tensor:
    """See `kernels.cells.encode_cells`."""
    rows, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    fields = x.new_empty((rows, code_bytes), dtype=torch.uint8)
    tile = tile_of(n)
    with torch.cuda.device_of(x):
        encode_cells_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x,
            fields,
            rows,
            x.stride(0),
            code_bytes,
            reach,
            steps_per_unit,
            n=n,
            BITS=bits,
            STARTS=tuple(starts),
            **tile,
            **EXACT,
        )
    return fields
