"""Small unsigned integers, one a byte, to dense bit fields and back, and from there through a table to any values.

Fields are little-endian within a byte: element ``i`` of a group takes the ``i``-th lowest field. A row always starts
on a byte boundary, so rows can be read on their own.

Packing multiplies a whole group, seen as one machine integer, by a constant that moves every field to its place in
the top byte; this runs at 0.08 ns an element with two CPU threads, against 0.3 for shifts and ors of strided slices.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_traced, traced_constant, unset_fake_temporarily

# Field width in bits -> (integer that holds one group of bytes, the multiplier, the shift that leaves the top byte).
# Byte i of a group weighs 2^(8 i) and must end at 2^(shift + width * i): the multiplier has the bits
# shift - (8 - width) * i. No two products share a bit, so nothing carries.
_GROUPS: dict[int, tuple[torch.dtype, int, int]] = {
    1: (torch.int64, sum(1 << (56 - 7 * i) for i in range(8)), 56),
    2: (torch.int32, sum(1 << (24 - 6 * i) for i in range(4)), 24),
    4: (torch.int16, (1 << 8) | (1 << 4), 8),
}


def packed_width(n: int, width: int) -> int:
    """Bytes that a row of `n` fields of `width` bits takes."""
    return -(-n * width // 8)


def pack_fields(fields: Tensor, width: int) -> Tensor:
    """Pack fields of `width` bits along the last dimension.

    Args:
        fields: uint8 or bool, `(..., n)`, every value below `2 ** width`.
        width: 1, 2 or 4 bits.

    Returns:
        uint8, `(..., ceil(n * width / 8))`.
    """
    group_dtype, multiplier, shift = _GROUPS[width]
    per_byte = 8 // width
    if fields.shape[-1] % per_byte:
        fields = F.pad(fields, (0, per_byte - fields.shape[-1] % per_byte))
    if fields.numel() == 0:
        return fields.new_zeros((*fields.shape[:-1], fields.shape[-1] // per_byte), dtype=torch.uint8)
    groups = fields.contiguous().view(group_dtype)
    return (groups * multiplier).bitwise_right_shift_(shift).to(torch.uint8)


def unpack_fields(packed: Tensor, width: int, n: int, table: Tensor) -> Tensor:
    """Look up every field of `packed` in `table`.

    Args:
        packed: uint8, `(..., ceil(n * width / 8))`, as `pack_fields` made it.
        width: 1, 2 or 4 bits.
        n: fields in a row.
        table: `(256, 8 // width)`: for each byte, what its fields stand for (see `byte_table`).

    Returns:
        `(..., n)`, dtype of `table`; a view into padding for odd `n`.
    """
    per_byte = 8 // width
    out = traced_constant(table).index_select(0, packed.reshape(-1).int())
    return out.view(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :n]


@lru_cache(maxsize=64)
def byte_table(width: int, values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For every byte, the `values` that its fields of `width` bits stand for: `(256, 8 // width)`."""
    # Real tables, also where an estimate asks for one first.
    with torch.inference_mode(False), unset_fake_temporarily():
        byte = torch.arange(256, device=device).unsqueeze(-1)
        shifts = torch.arange(0, 8, width, device=device)
        fields = (byte >> shifts) & (2**width - 1)
        return torch.tensor(values, dtype=dtype, device=device)[fields]


def code_width(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes of 1 to 4 bits takes. Three do not divide a byte: a plane of two and one of one."""
    return packed_width(n, 2) + packed_width(n, 1) if bits == 3 else packed_width(n, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `(rows, n)` of 1 to 4 bits into uint8 `(rows, code_width(n, bits))`."""
    if bits != 3:
        return pack_fields(codes, bits)
    return torch.cat([pack_fields(codes & 3, 2), pack_fields(codes >> 2, 1)], -1)


def unpack_codes(packed: Tensor, n: int, bits: int, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Which of the `2 ** bits` values each code stands for: `(rows, n)` in `dtype`; may be a view into padding."""
    device = packed.device
    if bits != 3:
        return unpack_fields(packed, bits, n, byte_table(bits, values, dtype, device))
    low, high = packed.split([packed_width(n, 2), packed_width(n, 1)], -1)
    return torch.where(
        unpack_fields(high, 1, n, byte_table(1, (0, 1), torch.bool, device)),
        unpack_fields(low, 2, n, byte_table(2, values[4:], dtype, device)),
        unpack_fields(low, 2, n, byte_table(2, values[:4], dtype, device)),
    )


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask `(..., n)` into uint8 `(..., ceil(n / 8))`, eight positions a byte."""
    return pack_fields(mask, 1)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The bool mask `(..., n)` that `pack_bits` packed."""
    if is_traced():
        # What reads the mask is compiled into one loop with this.
        bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        return bits.flatten(-2)[..., :n].bool()
    return unpack_fields(packed, 1, n, byte_table(1, (0, 1), torch.bool, packed.device))
