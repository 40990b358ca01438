"""`integers`, `round_gradient` and `finish_gradient` of `kernels.gradient`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import index_form
from .tiles import CODINGS, EXACT, MASK, POSITIONS, load_codes, load_fields, load_places, look_up_by_row, tile_of


@triton.jit
def integers_kernel(
    out,
    fields,
    index,
    table,
    member,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (column < n)[None, :]
    at = out + row.to(tl.int64)[:, None] * n
    codes = load_codes(fields, row, column, inside, fields_stride, n, BITS)
    x = look_up_by_row(codes, table, member, row, live, inside, BITS)
    if CODING == MASK:
        x = tl.where(load_fields(index, row, column, inside, index_stride, 1) > 0, 0, x)
    tl.store(at + column[None, :], x.to(tl.int8), mask=inside)
    if CODING >= POSITIONS:
        place, there = load_places(index, row, live, index_stride, n, k, CODING, ENDS, END_BYTES, KEPT)
        # What stands there already is another thread's.
        tl.debug_barrier()
        tl.store(at + place, (place * 0).to(tl.int8), mask=there)


def integers(
    fields: Tensor,
    index: Tensor | None,
    table: Tensor,
    member: Tensor | None,
    n: int,
    k: int,
    coding: str,
    bits: int,
) -> Tensor:
    """See `kernels.gradient.integers`."""
    fields, table = fields.contiguous(), table.contiguous()
    index, member = (None if t is None else t.contiguous() for t in (index, member))
    rows, tile = fields.shape[0], tile_of(n)
    out = fields.new_empty((rows, n), dtype=torch.int8)
    index, index_stride, ends, end_bytes = index_form(index, n, k, coding)
    with torch.cuda.device_of(out):
        integers_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            out,
            fields,
            index,
            table,
            member,
            rows,
            index_stride,
            fields.shape[1],
            n=n,
            k=k,
            CODING=CODINGS[coding],
            ENDS=ends,
            END_BYTES=end_bytes,
            KEPT=triton.next_power_of_2(max(k, 1)),
            BITS=bits,
            **tile,
            **EXACT,
        )
    return out


@triton.jit
def column_kernel(grad, row_scale, greatest, total, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of some rows: the greatest magnitude in each column, and the sum."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    inside = live[:, None] & (column < columns)[None, :]
    dy = tl.load(grad + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)
    to = tl.program_id(1) * columns + column
    tl.store(total + to, tl.sum(dy, 0), mask=column < columns)
    if row_scale is not None:
        dy *= tl.load(row_scale + row, mask=live, other=0).to(tl.float32)[:, None]
    magnitude = tl.max(dy.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    tl.store(greatest + to, magnitude.to(tl.float32, bitcast=True), mask=column < columns)


@triton.jit
def scramble(x):
    """C. Wellons, "Prospecting for Hash Functions", 2018: the function he calls lowbias32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


# A seed is never a constant to compile for.
@triton.jit(do_not_specialize=["seed"])
def round_kernel(grad, row_scale, factor, out, seed, numel, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    dy = tl.load(grad + at, mask=inside, other=0)
    if row_scale is not None:
        dy *= tl.load(row_scale + at // columns, mask=inside, other=0).to(tl.float32)
    dy *= tl.load(factor + at % columns, mask=inside, other=0)
    # As int32, of the same bits: an argument's type must not depend on its value.
    noise = scramble(at.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True))
    up = dy + (noise >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216) + 128.0
    # Truncation rounds down what is positive. Not a number becomes 1.
    up = tl.where(up > 1, up, 1.0)
    up = tl.where(up < 255, up, 255.0)
    tl.store(out + at, (up.to(tl.int32) - 128).to(tl.int8), mask=inside)


def round_gradient(grad: Tensor, row_scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.gradient.round_gradient`."""
    grad, row_scale = grad.contiguous(), None if row_scale is None else row_scale.contiguous()
    rows, columns = grad.shape
    out = torch.empty_like(grad, dtype=torch.int8)
    parts = grad.new_empty(2, triton.cdiv(rows, 64), columns)
    with torch.cuda.device_of(grad):
        column_kernel[(triton.cdiv(columns, 64), parts.shape[1])](
            grad, row_scale, parts[0], parts[1], rows, columns, ROWS=64, BLOCK=64, **EXACT
        )
        greatest = parts[0].amax(0)
        factor = torch.where(greatest == 0, 0, torch.div(greatest.new_full((), 127), greatest))
        round_kernel[(triton.cdiv(grad.numel(), 1024),)](
            grad, row_scale, factor, out, seed - 2**32 * (seed >= 2**31), grad.numel(), columns, BLOCK=1024, **EXACT
        )
    return out, greatest / 127, parts[1].sum(0)


@triton.jit
def kept_kernel(
    values,
    index,
    place,
    value,
    rows,
    index_stride,
    n: tl.constexpr,
    k: tl.constexpr,
    CODING: tl.constexpr,
    ENDS: tl.constexpr,
    END_BYTES: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Place and value of every kept element, `(rows, k)`, whatever the coding."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if CODING == MASK:
        column = tl.arange(0, BLOCK)
        inside = live[:, None] & (column < n)[None, :]
        kept = load_fields(index, row, column, inside, index_stride, 1)
        rank = tl.cumsum(kept, 1) - 1
        there = inside & (kept > 0) & (rank < k)
        at = row[:, None] * k + rank
        tl.store(place + at, tl.broadcast_to(column[None, :], [ROWS, BLOCK]), mask=there)
    else:
        where, there = load_places(index, row, live, index_stride, n, k, CODING, ENDS, END_BYTES, KEPT)
        at = row[:, None] * k + tl.arange(0, KEPT)[None, :]
        tl.store(place + at, where, mask=there)
    tl.store(value + at, tl.load(values + at, mask=there, other=0).to(tl.float32), mask=there)


@triton.jit
def finish_kernel(
    product,
    scale,
    grad,
    order,
    starts,
    value,
    gamma,
    beta,
    grad_sum,
    columns,
    n,
    k: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """A tile of the weight's gradient. Kept elements are sorted by their places: each tile has a run of them."""
    first = tl.program_id(0) * INPUTS
    i = first + tl.arange(0, INPUTS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sparse = tl.zeros([INPUTS, OUTPUTS], tl.float32)
    if k > 0:
        for source in range(first, tl.minimum(first + INPUTS, n)):
            total = tl.zeros([OUTPUTS], tl.float32)
            for at in range(tl.load(starts + source), tl.load(starts + source + 1)):
                element = tl.load(order + at)
                dy = tl.load(grad + element // k * columns + o, mask=o < columns, other=0)
                total += tl.load(value + element) * dy
            sparse += tl.where(i[:, None] == source, total[None, :], 0.0)
    inside = (i < n)[:, None] & (o < columns)[None, :]
    if TRANSPOSED:
        at = i.to(tl.int64)[:, None] * columns + o[None, :]
    else:
        at = o.to(tl.int64)[None, :] * n + i[:, None]
    result = tl.load(product + at, mask=inside, other=0).to(tl.float32)
    result = result * tl.load(scale + o, mask=o < columns, other=0)[None, :] + sparse
    if gamma is not None:
        result *= tl.load(gamma + i, mask=i < n, other=0)[:, None]
    if beta is not None:
        shift = tl.load(grad_sum + o, mask=o < columns, other=0)
        result += tl.load(beta + i, mask=i < n, other=0)[:, None] * shift[None, :]
    tl.store(product + at, result.to(tl.int32, bitcast=True), mask=inside)


def finish_gradient(
    product: Tensor,
    scale: Tensor,
    grad: Tensor,
    values: Tensor | None,
    index: Tensor | None,
    k: int,
    coding: str,
    gamma: Tensor | None,
    beta: Tensor | None,
    grad_sum: Tensor | None,
    transposed: bool,
) -> None:
    """See `kernels.gradient.finish_gradient`."""
    n, columns = product.shape if transposed else product.shape[::-1]
    scale, grad = scale.contiguous(), grad.contiguous()
    values, index, gamma, beta, grad_sum = (
        None if t is None else t.contiguous() for t in (values, index, gamma, beta, grad_sum)
    )
    order = starts = value = None
    with torch.cuda.device_of(grad):
        if values is not None and index is not None and k:
            order, starts, value = _kept_by_place(grad.shape[0], values, index, n, k, coding)
        finish_kernel[(triton.cdiv(n, 16), triton.cdiv(columns, 64))](
            product,
            scale,
            grad,
            order,
            starts,
            value,
            gamma,
            beta,
            grad_sum,
            columns,
            n,
            k=k,
            TRANSPOSED=transposed,
            INPUTS=16,
            OUTPUTS=64,
            **EXACT,
        )


def _kept_by_place(
    rows: int, values: Tensor, index: Tensor, n: int, k: int, coding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept elements in the order of their places, rows ascending within one; where each place's begin; all values."""
    integers, index_stride, ends, end_bytes = index_form(index, n, k, coding)
    place = values.new_empty((rows, k), dtype=torch.int32)
    value = values.new_empty((rows, k), dtype=torch.float32)
    tile = tile_of(n)
    kept_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        values,
        integers,
        place,
        value,
        rows,
        index_stride,
        n=n,
        k=k,
        CODING=CODINGS[coding],
        ENDS=ends,
        END_BYTES=end_bytes,
        KEPT=triton.next_power_of_2(k),
        **tile,
        **EXACT,
    )
    places, order = place.view(-1).sort(stable=True)
    starts = torch.searchsorted(places, torch.arange(n + 1, dtype=torch.int32, device=places.device))
    return order, starts, value
