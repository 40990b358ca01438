"""Values in cells of the real line: for each element, the number of the cell that it lies in.

The same cells hold for all rows, so a code needs no scale; and any function of the element can be read from it, by a
table with one value for each cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ..kernels import cells as _  # noqa: F401  registers the operator
from ..kernels import rows as native
from .bits import code_width, pack_codes, unpack_codes
from .layout import row_slices

FINE = 256


@dataclass(frozen=True)
class Cells:
    """A division of the real line into `2 ** bits` cells.

    Attributes:
        bits: 1, 2, 3, 4 or 8.
        reach: between `-reach` and `reach` lie `FINE` even steps; cells end where steps do. The outermost cells take
            all that lies beyond.
        starts: the step that each cell begins with, ascending from 0.
    """

    bits: int
    reach: float
    starts: tuple[int, ...]

    def cell_of_step(self, device: torch.device) -> Tensor:
        """The cell of every step: uint8 `(FINE,)`."""
        steps = torch.arange(FINE, device=device)
        starts = torch.tensor(self.starts[1:], device=device)
        return (steps.unsqueeze(-1) >= starts).sum(-1).to(torch.uint8)


def encode_cells(x: Tensor, cells: Cells) -> Tensor:
    """Code the rows of `x`; NaN goes to an arbitrary cell.

    Args:
        x: floating point, `(rows, n)`.
        cells: the division.

    Returns:
        uint8 `(rows, code_width(n, cells.bits))`; 8 bits: `(rows, n)`.
    """
    if x.numel() and native.handles(x.device.type, x.shape[1], cells.bits, x.dtype, x.dtype):
        width = code_width(x.shape[1], cells.bits)
        return torch.ops.hf_backrazor.encode_cells(x, cells.reach, _density(cells), cells.bits, cells.starts, width)
    slices = row_slices(*x.shape, x.device)
    codes = [_encode(x[start:stop], cells) for start, stop in slices]
    return codes[0] if len(codes) == 1 else torch.cat(codes)


def _encode(x: Tensor, cells: Cells) -> Tensor:
    x = x.float() if x.dtype.itemsize < 4 else x
    steps = (x + cells.reach).mul_(_density(cells)).clamp_(0, FINE - 1).to(torch.uint8)
    if cells.bits == 8:
        return steps
    codes = cells.cell_of_step(x.device).index_select(0, steps.reshape(-1).int())
    return pack_codes(codes.view(x.shape), cells.bits)


def _density(cells: Cells) -> float:
    """Steps in an interval of length 1."""
    return FINE / 2 / cells.reach


def decode_cells(fields: Tensor, n: int, cells: Cells, table: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The `table`'s value for the cell of each element.

    Args:
        fields: what `encode_cells` returned, or rows of it.
        n: elements in a row.
        cells: the division.
        table: a value for each cell.
        dtype: of the result.

    Returns:
        `(rows, n)` in `dtype`; may be a view into padding.
    """
    if cells.bits == 8:
        return torch.tensor(table, dtype=dtype, device=fields.device)[fields.int()]
    if fields.numel() and native.handles(fields.device.type, n, cells.bits, dtype, dtype):
        parts = (None, None, None, fields, None)
        return torch.ops.hf_backrazor.unpack(
            *parts, 1, 0, None, fields.shape[0], n, 0, "none", cells.bits, table, None, None, -inf, inf, dtype
        )
    return unpack_codes(fields, n, cells.bits, table, dtype)
