"""Which elements of a set are kept, in as few bytes as their number allows."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import pack_bits, packed_width, unpack_bits

BLOCK = 256


def index_coding(n: int, k: int) -> str:
    """How the places of `k` kept among `n` elements take the fewest bytes.

    Returns:
        `"none"`: all or nothing is kept. `"mask"`: a bit for every element. `"positions"`: an integer for each that is
        kept. `"offsets"`: one byte for each, its place within a block of `BLOCK` elements, and for every block but the
        last how many are kept up to its end.
    """
    if k in (0, n):
        return "none"
    return min(("mask", "positions", "offsets"), key=lambda coding: index_bytes(n, k, coding))


def index_bytes(n: int, k: int, coding: str) -> int:
    """Bytes that the index of a set takes."""
    if coding == "mask":
        return packed_width(n, 1)
    if coding == "positions":
        return k * position_dtype(n).itemsize
    return k + _ends(n) * position_dtype(k + 1).itemsize if coding == "offsets" else 0


def index_dtype(n: int, coding: str) -> torch.dtype:
    """dtype that the index is stored in."""
    return position_dtype(n) if coding == "positions" else torch.uint8


def encode_index(keep: Tensor, positions: Tensor, coding: str) -> Tensor:
    """Store the places of the elements that are kept.

    Args:
        keep: bool `(sets, n)`.
        positions: int64 `(sets, k)`: where `keep` is true, ascending.
        coding: what `index_coding` chose.

    Returns:
        `(sets, ...)`: uint8 for `"mask"` and `"offsets"`, otherwise `position_dtype(n)`.
    """
    n, k = keep.shape[-1], positions.shape[-1]
    if coding == "mask":
        return pack_bits(keep)
    if coding == "positions":
        return positions.to(position_dtype(n))
    offsets = (positions % BLOCK).to(torch.uint8)
    if not _ends(n):
        return offsets
    bounds = torch.arange(BLOCK, n, BLOCK, device=keep.device).expand(keep.shape[0], -1).contiguous()
    ends = torch.searchsorted(positions, bounds).to(position_dtype(k + 1))
    return torch.cat([ends.view(torch.uint8), offsets], -1)


def scatter_kept(dense: Tensor, index: Tensor, values: Tensor, coding: str) -> Tensor:
    """Write the kept `values` `(sets, k)` to their places in `dense` `(sets, n)`, in place."""
    n, k = dense.shape[-1], values.shape[-1]
    if coding == "mask":
        return dense.masked_scatter_(unpack_bits(index, n), values)
    if coding == "positions":
        return dense.scatter_(-1, index.long(), values)
    dtype = position_dtype(k + 1)
    ends, offsets = index.split([_ends(n) * dtype.itemsize, k], -1)
    positions = offsets.long()
    if _ends(n):
        rank = torch.arange(k, device=dense.device).expand(dense.shape[0], -1).contiguous()
        # A copy begins and has its rows where `dtype` is aligned.
        ends = ends.clone(memory_format=torch.contiguous_format).view(dtype)
        block = torch.searchsorted(ends.long(), rank, right=True)
        positions += block.mul_(BLOCK)
    return dense.scatter_(-1, positions, values)


def position_dtype(n: int) -> torch.dtype:
    """The smallest dtype that counts from 0 to `n - 1`."""
    if n <= 2**8:
        return torch.uint8
    return torch.int16 if n <= 2**15 else torch.int32


def _ends(n: int) -> int:
    """Blocks of `n` elements whose end is stored; that of the last one is known."""
    return -(-n // BLOCK) - 1
