"""What the kernels share: tiles of whole rows, `(ROWS, BLOCK)`, with BLOCK the power of two from the rows' width on."""

from __future__ import annotations

import triton
import triton.language as tl

# Codings of the places of kept elements: `packing.index`.
NO_INDEX, MASK, POSITIONS, OFFSETS = (tl.constexpr(i) for i in range(4))
CODINGS = {"none": 0, "mask": 1, "positions": 2, "offsets": 3}

# Elements of a tile. A thread of a block has 32 of them.
TILE = 4096

# Results have to be the torch code's to the bit: no contraction of products and sums to one rounding.
EXACT = {"enable_fp_fusion": False}


def tile_of(n: int) -> dict[str, int]:
    """ROWS, BLOCK and the warps that work on a tile of rows of `n` elements."""
    block = max(16, triton.next_power_of_2(n))
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4 if block <= TILE else 16}


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to the nearest number that `dtype` has, ties to even; still float32."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, nearest)
        return nearest.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def store_fields(
    codes, to, row, live, stride, n: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Pack a tile of codes of 1, 2 or 4 bits, zero beyond `n`, into bytes from `to` on."""
    PER: tl.constexpr = 8 // WIDTH
    shifts = tl.arange(0, PER) * WIDTH
    bytes_ = tl.sum(tl.reshape(codes, [ROWS, BLOCK // PER, PER]) << shifts[None, None, :], 2)
    place = tl.arange(0, BLOCK // PER)
    inside = live[:, None] & (place < (n * WIDTH + 7) // 8)[None, :]
    tl.store(to + row[:, None] * stride + place[None, :], bytes_.to(tl.uint8), mask=inside)


@triton.jit
def load_fields(fields, row, column, inside, stride, WIDTH: tl.constexpr):
    """The codes of 1, 2 or 4 bits that `store_fields` packed, as int32."""
    PER: tl.constexpr = 8 // WIDTH
    byte = tl.load(fields + row[:, None] * stride + (column // PER)[None, :], mask=inside, other=0).to(tl.int32)
    return (byte >> ((column % PER) * WIDTH)[None, :]) & ((1 << WIDTH) - 1)


@triton.jit
def store_codes(
    codes, to, row, live, stride, n: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Pack a tile of codes of 1 to 4 bits; three are a plane of two and one of one."""
    if BITS == 3:
        store_fields(codes & 3, to, row, live, stride, n, 2, ROWS, BLOCK)
        store_fields(codes >> 2, to + (n * 2 + 7) // 8, row, live, stride, n, 1, ROWS, BLOCK)
    else:
        store_fields(codes, to, row, live, stride, n, BITS, ROWS, BLOCK)


@triton.jit
def load_codes(fields, row, column, inside, stride, n: tl.constexpr, BITS: tl.constexpr):
    """The codes that `store_codes` packed, as int32."""
    if BITS == 3:
        low = load_fields(fields, row, column, inside, stride, 2)
        return low | (load_fields(fields + (n * 2 + 7) // 8, row, column, inside, stride, 1) << 2)
    else:
        return load_fields(fields, row, column, inside, stride, BITS)


@triton.jit
def look_up(codes, BITS: tl.constexpr, TABLE: tl.constexpr, dtype: tl.constexpr):
    """What each code stands for."""
    result = tl.zeros(codes.shape, dtype)
    for code in tl.static_range(2**BITS):
        result = tl.where(codes == code, TABLE[code], result)
    return result.to(dtype)


@triton.jit
def look_up_by_row(codes, table, member, row, live, inside, BITS: tl.constexpr):
    """What each code stands for, by the line of a table `(members, 2 ** BITS)` that holds for its row."""
    if member is not None:
        codes += (tl.load(member + row, mask=live, other=0).to(tl.int32) << BITS)[:, None]
    return tl.load(table + codes, mask=inside, other=0)


@triton.jit
def rotation_signs(place):
    """The signs of elements by their places in a block: the bits of `packing.rotation.SIGNS`, 1 for minus."""
    # As int32, of the same bits.
    low = tl.where(place < 32, 0x03707344, 0x13198A2E)
    high = tl.where(place < 96, 0x85A308D3 - 0x100000000, 0x243F6A88)
    bit = (tl.where(place < 64, low, high) >> (place % 32)) & 1
    return tl.where(bit > 0, -1.0, 1.0)


@triton.jit
def butterfly(x, column, n: tl.constexpr, APART: tl.constexpr):
    """Sums and differences of elements so far apart, in the blocks of at least twice that size."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [ROWS, BLOCK // (2 * APART), 2, APART]), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    # Blocks are in descending order of size. What lies beyond the row does not matter.
    taken = (column < n // (2 * APART) * (2 * APART))[None, :]
    return tl.where(taken, tl.reshape(pairs, [ROWS, BLOCK]), x) if n % (2 * APART) else tl.reshape(pairs, [ROWS, BLOCK])


@triton.jit
def rotate_tile(x, column, n: tl.constexpr, BACK: tl.constexpr):
    """A tile of rows turned, or turned back: `packing.rotation`."""
    size = tl.full(column.shape, 1, tl.int32)
    factor = tl.full(column.shape, 1.0, tl.float32)
    for power in tl.static_range(1, 8):
        of_size = column < n // 2**power * 2**power
        size = tl.where(of_size, 2**power, size)
        factor = tl.where(of_size, 2.0 ** (-0.5 * power), factor)
    signs = rotation_signs(column % size)[None, :]
    if not BACK:
        x = x * signs
    for stage in tl.static_range(7):
        if n >= 128 >> stage:
            x = butterfly(x, column, n, 64 >> stage)
    x = x * factor[None, :]
    if BACK:
        x = x * signs
    return x


@triton.jit
def load_places(
    index,
    row,
    live,
    stride,
    n: tl.constexpr,
    k: tl.constexpr,
    CODING: tl.constexpr,
    ENDS: tl.constexpr,
    END_BYTES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Where kept elements are, `(ROWS, KEPT)`, for positions and offsets; and which of them there are."""
    rank = tl.arange(0, KEPT)
    there = live[:, None] & (rank < k)[None, :]
    place = tl.load(index + row[:, None] * stride + (ENDS * END_BYTES + rank)[None, :], mask=there, other=0)
    place = place.to(tl.int32)
    if CODING == OFFSETS:
        for block in range(ENDS):
            end = tl.zeros(row.shape, tl.int32)
            # Byte by byte: rows of an index begin at any address.
            for byte in tl.static_range(END_BYTES):
                at = index + row * stride + block * END_BYTES + byte
                end |= tl.load(at, mask=live, other=0).to(tl.int32) << (8 * byte)
            place += tl.where(rank[None, :] >= end[:, None], 256, 0)
    return place, there & (place < n)


@triton.jit
def unpack_tile(
    out,
    values,
    index,
    scale,
    fields,
    centre,
    group,
    first,
    row,
    live,
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
    BLOCK: tl.constexpr,
):
    """Write packed rows to `out`, rows of `n` elements; or, with a sign, add them to what stands there."""
    column = tl.arange(0, BLOCK)
    inside = live[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * n
    dtype: tl.constexpr = out.dtype.element_ty
    if BITS > 0:
        x = look_up(load_codes(fields, row, column, inside, fields_stride, n, BITS), BITS, LEVELS, tl.float32)
        if scale is not None:
            x *= tl.load(scale + row, mask=live, other=0).to(tl.float32)[:, None]
        if ROTATED:
            x = rotate_tile(x, column, n, True)
    elif KEEP_BASE:
        x = tl.load(out + at + column[None, :], mask=inside, other=0).to(tl.float32)
    else:
        x = tl.zeros(inside.shape, tl.float32)
    if CODING == MASK:
        kept = load_fields(index, row, column, inside, index_stride, 1)
        rank = tl.cumsum(kept, 1) - 1
        kept_here = inside & (kept > 0) & (rank < k)
        x = tl.where(kept_here, tl.load(values + row[:, None] * k + rank, mask=kept_here, other=0).to(tl.float32), x)
    centre_at = (first + row) // group * n
    if centre is not None:
        x += tl.load(centre + centre_at[:, None] + column[None, :], mask=inside, other=0).to(tl.float32)
    if CODING >= POSITIONS:
        place, there = load_places(index, row, live, index_stride, n, k, CODING, ENDS, END_BYTES, KEPT)
    if SIGN != 0:
        x = tl.load(out + at + column[None, :], mask=inside, other=0) + SIGN * x
        if CODING >= POSITIONS:
            before = tl.load(out + at + place, mask=there, other=0)
            # Other threads write there.
            tl.debug_barrier()
    tl.store(out + at + column[None, :], rounded(x, dtype).to(dtype), mask=inside)
    if CODING >= POSITIONS:
        rank = tl.arange(0, KEPT)
        value = tl.load(values + row[:, None] * k + rank[None, :], mask=there, other=0).to(tl.float32)
        if centre is not None:
            value += tl.load(centre + centre_at[:, None] + place, mask=there, other=0).to(tl.float32)
        if SIGN != 0:
            value = before + SIGN * value
        # What stands there already is another thread's.
        tl.debug_barrier()
        tl.store(out + at + place, rounded(value, dtype).to(dtype), mask=there)
