"""Low-bit codes of a row: one scale, and for each element the number of the nearest level.

1 to 4 bits: sign and magnitude. The levels are either the Lloyd-Max levels of a unit Gaussian (J. Max, "Quantizing for
minimum distortion", IRE Trans. Inf. Theory 6, 1960, table I), and an element takes the nearest at the row's root mean
square; or evenly spaced, the outermost being the row's greatest magnitude. The former suit what is left of a row
without its outliers, the latter a row with them. 8 bits: 255 evenly spaced levels.

That is also the scale which is stored. Of rows that were rotated (see `rotation`) it is sum(x^2) / sum(x q(x)) instead,
with q(x) the level of x: what is decoded has the projection 1 onto what was coded, where levels that are the means of
their intervals decode to something shorter (S. Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed
Mean Estimation for Federated Learning", ICML 2022). Rows as they are may be sparse, and such a scale would make their
zeros, whose level is the least, as large as the rest: of a DPT with ReLU before its convolutions, the gradient then has
1.5 times its norm.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import pack_codes, unpack_codes
from .rotation import rotate, unrotate

CODE_BITS = (1, 2, 3, 4, 8)

_GAUSSIAN_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450941, 0.7560052, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180463, 2.0690165, 2.7326357),
}
_EVEN_LEVELS = {
    bits: tuple((i + 0.5) / (2 ** (bits - 1) - 0.5) for i in range(2 ** (bits - 1))) for bits in (1, 2, 3, 4)
}

# Levels above zero, in units of the scale; those below mirror them.
_POSITIVE = {
    (name, bits): positive
    for name, table in (("gaussian", _GAUSSIAN_LEVELS), ("even", _EVEN_LEVELS))
    for bits, positive in table.items()
}
_LEVELS = {key: positive + tuple(-level for level in positive) for key, positive in _POSITIVE.items()}
_THRESHOLDS = {
    key: tuple((lower + upper) / 2 for lower, upper in itertools.pairwise(positive))
    for key, positive in _POSITIVE.items()
}


class Codes(NamedTuple):
    """A matrix in low-bit codes.

    Attributes:
        scale: `(rows, 1)`; bfloat16 for 1 to 4 bits, float32 for 8.
        fields: 1 to 4 bits: uint8 `(rows, code_width(n, bits))`; 8 bits: int8 `(rows, n)`.
    """

    scale: Tensor
    fields: Tensor


def encode(x: Tensor, bits: int, keep: Tensor | None = None, levels: str = "gaussian", rotated: bool = False) -> Codes:
    """Code the rows of `x`.

    A NaN or infinity in a row makes its scale non-finite, and the whole row decodes to NaN.

    Args:
        x: floating point, `(rows, n)`.
        bits: one of `CODE_BITS`.
        keep: bool `(rows, n)`: elements stored elsewhere. They get an arbitrary code and do not count for the scale.
        levels: `"gaussian"` or `"even"`; 8 bits are always even.
        rotated: turn the rows first (see `rotation`); not with 8 bits.
    """
    x = x.float() if x.dtype.itemsize < 4 else x
    if keep is not None:
        x = x.masked_fill(keep, 0)
    if bits == 8:
        scale = _greatest(x).div_(127).float()
        return Codes(scale, (x / _divisor(scale)).round_().nan_to_num_(0, 0, 0).clamp_(-127, 127).to(torch.int8))
    counted: int | Tensor = x.shape[-1]
    if rotated:
        # Every coordinate has its share of what is left, also where an element was taken out.
        x = rotate(x)
    elif keep is not None:
        counted = (counted - keep.sum(-1, keepdim=True)).clamp_(min=1)
    # In double precision, the order of summation does not show.
    squares = x.double().square().sum(-1, keepdim=True)
    reach = _greatest(x) if levels == "even" else (squares / counted).sqrt_().to(x.dtype)
    reach = reach.to(torch.bfloat16).to(x.dtype)
    magnitude = x.abs()
    # Not the sign bit: that of a NaN depends on the processor.
    codes = (x < 0).to(torch.uint8).mul_(2 ** (bits - 1))
    for threshold in thresholds_of(bits, levels):
        codes += magnitude > reach * threshold
    fields = pack_codes(codes, bits)
    if not rotated:
        return Codes(reach.to(torch.bfloat16), fields)
    chosen = unpack_codes(fields, x.shape[-1], bits, levels_of(bits, levels), x.dtype)
    products = (x.double() * chosen).sum(-1, keepdim=True)
    scale = torch.where(products == 0, 0, squares / products)
    return Codes(scale.to(torch.float32).to(torch.bfloat16), fields)


def decode(
    codes: Codes, bits: int, n: int, dtype: torch.dtype, levels: str = "gaussian", rotated: bool = False
) -> Tensor:
    """What `codes` stand for: `(rows, n)` in `dtype`. All-zero rows decode to zero."""
    scale, fields = codes
    if bits == 8:
        return fields.to(dtype).mul_(scale.to(dtype))
    if rotated:
        wide = torch.promote_types(dtype, torch.float32)
        return unrotate(unpack_codes(fields, n, bits, levels_of(bits, levels), wide) * scale.to(wide)).to(dtype)
    return unpack_codes(fields, n, bits, levels_of(bits, levels), dtype) * scale.to(dtype)


def levels_of(bits: int, levels: str) -> tuple[float, ...]:
    """What each code of 1 to 4 bits stands for, in units of the scale: the positive levels, then the negative ones."""
    return _LEVELS[levels, bits]


def thresholds_of(bits: int, levels: str) -> tuple[float, ...]:
    """What lies half way between neighbouring positive levels."""
    return _THRESHOLDS[levels, bits]


def _greatest(x: Tensor) -> Tensor:
    """The greatest magnitude of each row, `(rows, 1)`."""
    return x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(x.shape[0], 1)


def _divisor(scale: Tensor) -> Tensor:
    """`scale`, with 1 for 0: an all-zero row is coded without dividing by zero."""
    return torch.where(scale == 0, 1, scale)
