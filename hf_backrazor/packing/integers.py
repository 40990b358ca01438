"""Weight gradients computed from the codes themselves.

dW = dY^T x. With codes c of x, one scale s for each row, and the exact elements e, x = s c + e, so dW = (dY s)^T c +
dY^T e. The codes' levels are small integers already, up to a common factor. dY s is rounded to 8 bits, at random to
one of the two nearest integers, so that its mean is exact; each output column has a scale of its own. Then the first
term is a product of integers, which processors have faster instructions for. The second is sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..compat import has_integer_products, integer_product, unset_fake_temporarily
from ..kernels import gradient as native_gradient
from ..kernels import rows as native
from .bits import unpack_codes
from .index import scatter_kept


def fast_with_integers(grad: Tensor, n: int) -> bool:
    """Whether the device multiplies 8-bit integers fast, and matrices of such sizes.

    Args:
        grad: dY, `(rows, columns)`.
        n: columns of x.
    """
    if min(*grad.shape, n) < 16:
        return False
    if grad.device.type == "cpu":
        return has_integer_products()
    if grad.device.type == "cuda":
        # What `torch._int_mm` asks of a CUDA device.
        return not torch.version.hip and grad.shape[0] % 8 == 0 and grad.shape[1] % 8 == 0 and n % 8 == 0
    return False


class Kept(NamedTuple):
    """The elements of a matrix that are kept exactly: `(rows, k)` values, the index of their places and its coding."""

    values: Tensor
    places: Tensor
    coding: str


class Integers(NamedTuple):
    """A matrix as unit * row_scale * codes + what is kept exactly.

    Attributes:
        codes: int8 `(rows, n)`, zero where an element is kept.
        unit: a number.
        row_scale: bfloat16 `(rows, 1)`, or None: 1.
        kept: or None.
    """

    codes: Tensor
    unit: float
    row_scale: Tensor | None
    kept: Kept | None


def decode_integers(
    fields: Tensor, n: int, bits: int, levels: Sequence[float], row_scale: Tensor | None, kept: Kept | None
) -> Integers:
    """Read codes as integers, their `levels` rounded to 127ths of the greatest.

    Args:
        fields: uint8 `(rows, code_width(n, bits))`.
        n: elements in a row.
        bits: 1 to 4.
        levels: what each code stands for.
        row_scale: see `Integers`.
        kept: see `Integers`.
    """
    unit, table = _integers_of(tuple(levels), fields.device)
    return Integers(_codes(fields, None, n, bits, table, kept), unit, row_scale, kept)


@lru_cache(maxsize=64)
def _integers_of(levels: tuple[float, ...], device: torch.device) -> tuple[float, Tensor]:
    """A 127th of the greatest level, and the levels rounded to multiples of it: int8 `(1, len(levels))`."""
    unit = max(map(abs, levels)) / 127
    # Real tables, also where an estimate asks for one first.
    with torch.inference_mode(False), unset_fake_temporarily():
        return unit, torch.tensor([[round(level / unit) for level in levels]], dtype=torch.int8, device=device)


def decode_integers_by_row(
    fields: Tensor, member: Tensor, n: int, bits: int, table: Tensor, row_scale: Tensor, kept: Kept | None
) -> Integers:
    """Read codes as integers, by a line of a table for each row.

    Args:
        fields: uint8 `(rows, code_width(n, bits))`.
        member: uint8 `(rows,)`: the line of the table that holds for each row.
        n: elements in a row.
        bits: 1 to 4.
        table: int8 `(members, 2 ** bits)`: what each code stands for.
        row_scale: see `Integers`.
        kept: see `Integers`.
    """
    return Integers(_codes(fields, member, n, bits, table, kept), 1.0, row_scale, kept)


def _codes(fields: Tensor, member: Tensor | None, n: int, bits: int, table: Tensor, kept: Kept | None) -> Tensor:
    if fields.numel() and native.handles(fields.device.type, n, bits, torch.float32, _value_dtype(kept)):
        index, k, coding = (None, 0, "none") if kept is None else (_bytes(kept), kept.values.shape[-1], kept.coding)
        return native_gradient.integers(fields, index, table, member, n, k, coding, bits)
    codes = look_up_by_row(fields, member, n, bits, table).contiguous()
    if kept is not None:
        zeros = torch.zeros(kept.values.shape, dtype=torch.int8, device=codes.device)
        codes = scatter_kept(codes, kept.places, zeros, kept.coding)
    return codes


def look_up_by_row(fields: Tensor, member: Tensor | None, n: int, bits: int, table: Tensor) -> Tensor:
    """What each code stands for, by a line of a table for each row.

    Args:
        fields: uint8 `(rows, code_width(n, bits))`; 8 bits: `(rows, n)`.
        member: uint8 `(rows,)`: the line of the table that holds for each row; or None: the first for all.
        n: elements in a row.
        bits: 1 to 4, or 8.
        table: `(members, 2 ** bits)`.

    Returns:
        `(rows, n)` in the table's dtype.
    """
    codes = fields if bits == 8 else unpack_codes(fields, n, bits, tuple(range(2**bits)), torch.uint8)
    at = codes.int()
    if member is not None:
        at += (member.int() << bits).unsqueeze(-1)
    return table.view(-1).index_select(0, at.reshape(-1)).view(at.shape)


def weight_gradient(
    grad: Tensor,
    x: Integers,
    gamma: Tensor | None,
    beta: Tensor | None,
    transposed: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """dY^T (gamma x + beta), the first term of it by integers; and dY summed over rows.

    Args:
        grad: dY, float32 `(rows, columns)`.
        x: of `(rows, n)`.
        gamma: `(n,)`, or None: 1.
        beta: `(n,)`, or None: 0.
        transposed: return the transpose.
        seed: of the rounding, below 2^32.

    Returns:
        float32 `(columns, n)`, or `(n, columns)` if `transposed`; float32 `(columns,)`.
    """
    compiled = native.handles(grad.device.type, x.codes.shape[1], 0, torch.float32, _value_dtype(x.kept))
    rounded, scale, grad_sum = (native_gradient.round_gradient if compiled else round_gradient)(grad, x.row_scale, seed)
    scale *= x.unit
    # Of matrices with a single row or column torch 2.13 computes wrong products; `fast_with_integers` rules them out.
    product = integer_product(x.codes.t(), rounded) if transposed else integer_product(rounded.t(), x.codes)
    gamma = None if gamma is None else gamma.float()
    beta = None if beta is None else beta.float()
    if compiled:
        values, index, k, coding = (None, None, 0, "none")
        if x.kept is not None:
            values, index, k, coding = x.kept.values, _bytes(x.kept), x.kept.values.shape[-1], x.kept.coding
        product = product.contiguous()
        native_gradient.finish_gradient(
            product, scale, grad, values, index, k, coding, gamma, beta, grad_sum, transposed
        )
        return product.view(torch.float32), grad_sum
    by_column = product.t() if transposed else product
    out = by_column * scale.unsqueeze(-1)
    if x.kept is not None:
        zeros = torch.zeros(x.codes.shape, dtype=grad.dtype, device=grad.device)
        out += grad.t() @ scatter_kept(zeros, x.kept.places, x.kept.values.to(grad.dtype), x.kept.coding)
    out = out if gamma is None else out.mul_(gamma)
    out = out if beta is None else out.addr_(grad_sum, beta)
    return (out.t().contiguous() if transposed else out), grad_sum


def round_gradient(grad: Tensor, row_scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.gradient.round_gradient`."""
    scaled = grad if row_scale is None else grad * row_scale.to(grad.dtype)
    greatest = scaled.abs().amax(0)
    # A division, where `127 / greatest` would multiply by the reciprocal.
    factor = torch.where(greatest == 0, 0, torch.div(greatest.new_full((), 127), greatest))
    place = torch.arange(grad.numel(), dtype=torch.int64, device=grad.device).view(grad.shape)
    noise = (_scramble((place & _WORD) ^ seed) >> 8).float() * 2.0**-24
    up = scaled * factor + noise + 128
    up = torch.where(up > 1, up, 1).clamp_(max=255)
    return (up.to(torch.int32) - 128).to(torch.int8), greatest / 127, grad.sum(0)


_WORD = 2**32 - 1


def _scramble(x: Tensor) -> Tensor:
    """Equally distributed 32-bit numbers from different ones, all in int64.

    C. Wellons, "Prospecting for Hash Functions", 2018: the function he calls lowbias32.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x ^= x >> 15
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _value_dtype(kept: Kept | None) -> torch.dtype:
    return torch.float32 if kept is None else kept.values.dtype


def _bytes(kept: Kept) -> Tensor:
    return kept.places.view(torch.uint8)
