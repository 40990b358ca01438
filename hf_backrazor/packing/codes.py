"""Low-bit codes of a row: one scale, and for each element the number of the nearest level.

1 to 4 bits: sign and magnitude, with the Lloyd-Max levels of a unit Gaussian (J. Max, "Quantizing for minimum
distortion", IRE Trans. Inf. Theory 6, 1960, table I), scaled by the row's root mean square. 8 bits: 255 evenly spaced
levels, scaled by the row's greatest magnitude.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import byte_table, pack_fields, packed_width, unpack_fields

CODE_BITS = (1, 2, 3, 4, 8)

# Positive levels; the negative ones mirror them. The thresholds lie half way between neighbours.
_GAUSSIAN_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450941, 0.7560052, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180463, 2.0690165, 2.7326357),
}


class Codes(NamedTuple):
    """A matrix in low-bit codes.

    Attributes:
        scale: `(rows, 1)`; bfloat16 for 1 to 4 bits, float32 for 8.
        fields: 1, 2, 4 bits: uint8 `(rows, ceil(n * bits / 8))`; 3 bits: `rows` of two magnitude bits, followed by
            `rows` of one sign bit, in one flat tensor; 8 bits: int8 `(rows, n)`.
    """

    scale: Tensor
    fields: Tensor


def encode(x: Tensor, bits: int, keep: Tensor | None = None) -> Codes:
    """Code the rows of `x`.

    A NaN or infinity in a row makes its scale non-finite, and the whole row decodes to NaN.

    Args:
        x: floating point, `(rows, n)`.
        bits: one of `CODE_BITS`.
        keep: bool `(rows, n)`: elements stored elsewhere. They get an arbitrary code and do not count for the scale.
    """
    x = x.float() if x.dtype.itemsize < 4 else x
    if keep is not None:
        x = x.masked_fill(keep, 0)
    if bits == 8:
        scale = (x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(x.shape[0], 1)).div_(127).float()
        return Codes(scale, (x / _divisor(scale)).round_().nan_to_num_(0, 0, 0).clamp_(-127, 127).to(torch.int8))
    counted = x.shape[-1] if keep is None else (x.shape[-1] - keep.sum(-1, keepdim=True)).clamp_(min=1)
    scale = (x.square().sum(-1, keepdim=True) / counted).sqrt_().to(torch.bfloat16)
    levels = _GAUSSIAN_LEVELS[bits]
    magnitude = x.abs().div_(_divisor(scale))
    fields = x.signbit().to(torch.uint8).mul_(len(levels))
    for lower, upper in itertools.pairwise(levels):
        fields += magnitude > (lower + upper) / 2
    return Codes(scale, _pack(fields, bits))


def decode(codes: Codes, bits: int, n: int, dtype: torch.dtype) -> Tensor:
    """The levels that `codes` stand for: `(rows, n)` in `dtype`. All-zero rows decode to zero."""
    scale, fields = codes
    if bits == 8:
        return fields.to(dtype).mul_(scale.to(dtype))
    levels = _GAUSSIAN_LEVELS[bits]
    if bits != 3:
        table = byte_table(bits, levels + tuple(-level for level in levels), dtype, fields.device)
        return unpack_fields(fields, bits, n, table) * scale.to(dtype)
    low, high = _split_three_bits(fields, scale.shape[0], n)
    magnitude = unpack_fields(low, 2, n, byte_table(2, levels, dtype, fields.device))
    sign = unpack_fields(high, 1, n, byte_table(1, (1.0, -1.0), dtype, fields.device))
    return (magnitude * sign).mul_(scale.to(dtype))


def encode_grid(x: Tensor, low: float, step: float, bits: int) -> Tensor:
    """Code the rows of `x` on the evenly spaced levels `low + step * i`, `0 <= i < 2 ** bits`, the same for all rows.

    Args:
        x: floating point, `(rows, n)`, finite; values outside of the grid go to its ends.
        low: least level.
        step: distance between levels.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        uint8 fields, as in `Codes.fields` for the same number of bits (8 bits: uint8 `(rows, n)`).
    """
    fields = x.sub(low).mul_(1 / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return fields if bits == 8 else _pack(fields, bits)


def decode_grid(
    fields: Tensor, shape: tuple[int, int], low: float, step: float, bits: int, dtype: torch.dtype
) -> Tensor:
    """What `encode_grid` coded: `shape` = `(rows, n)`, in `dtype`."""
    rows, n = shape
    if bits == 8:
        return fields.to(dtype).mul_(step).add_(low)
    if bits != 3:
        levels = tuple(low + step * i for i in range(2**bits))
        return unpack_fields(fields, bits, n, byte_table(bits, levels, dtype, fields.device))
    first, second = _split_three_bits(fields, rows, n)
    # Level i = 4 h + l is (low + step l) + 4 step h: two look-ups and a sum.
    levels = tuple(low + step * i for i in range(4))
    dense = unpack_fields(first, 2, n, byte_table(2, levels, dtype, fields.device))
    return dense + unpack_fields(second, 1, n, byte_table(1, (0.0, 4 * step), dtype, fields.device))


def _pack(fields: Tensor, bits: int) -> Tensor:
    """Pack 1 to 4 bits a field. Three do not divide a byte: the two low bits of all fields, then the high ones."""
    if bits != 3:
        return pack_fields(fields, bits)
    low, high = pack_fields(fields & 3, 2), pack_fields(fields >> 2, 1)
    return torch.cat([low.reshape(-1), high.reshape(-1)])


def _split_three_bits(fields: Tensor, rows: int, n: int) -> tuple[Tensor, Tensor]:
    low_bytes, high_bytes = packed_width(n, 2), packed_width(n, 1)
    low, high = fields.split([rows * low_bytes, rows * high_bytes])
    return low.view(rows, low_bytes), high.view(rows, high_bytes)


def _divisor(scale: Tensor) -> Tensor:
    """`scale`, with 1 for 0: an all-zero row is coded without dividing by zero."""
    return torch.where(scale == 0, 1, scale)
