"""Values in cells of the real line: for each element, the number of the cell that it lies in.

There are a few divisions of the line into cells, for numbers of different scale, and each row takes the one that fits
its mean square. Its codes need no other scale; and any function of the element can be read from them, by a table with
one value for each cell of each division.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..compat import is_traced, traced_constant, unset_fake_temporarily
from ..kernels import cells as native_cells
from ..kernels import rows as native
from .bits import code_width, pack_codes
from .integers import Integers, Kept, decode_integers_by_row, look_up_by_row
from .layout import in_slices, row_slices

FINE = 256

_Constants = TypeVar("_Constants", "Cells", "CellTable")


def _on(constants: _Constants, device: torch.device) -> _Constants:
    """The same with its tensors on a device. It is copied there once."""
    if device not in constants.copies:
        # Real tensors, also where an estimate asks for them first.
        with torch.inference_mode(False), unset_fake_temporarily():
            given = {f.name: getattr(constants, f.name) for f in fields(constants) if f.init}
            moved: dict[str, Any] = {name: x.to(device) for name, x in given.items() if isinstance(x, Tensor)}
            constants.copies[device] = replace(constants, copies=constants.copies, **moved)
    there = constants.copies[device]
    if not is_traced():
        return there
    # Nobody else may find these.
    given = {f.name: getattr(there, f.name) for f in fields(constants) if f.init}
    traced: dict[str, Any] = {name: traced_constant(x) for name, x in given.items() if isinstance(x, Tensor)}
    return replace(there, copies={}, **traced)


@dataclass(frozen=True, eq=False)
class Cells:
    """Divisions of the real line into `2 ** bits` cells, for rows of different scale.

    A division has `FINE` even steps, half of them below zero; cells end where steps do. The outermost cells take all
    that lies beyond.

    Attributes:
        bits: 1, 2, 3, 4 or 8.
        bounds: float32 `(members - 1,)`, ascending, for at most 256 members: a row takes the division whose number is
            how many of them its mean square reaches. Not a number reaches none.
        density: float32 `(members,)`: steps in an interval of length 1.
        starts: uint8 `(members, 2 ** bits)`: the step that each cell begins with, ascending from 0.
    """

    bits: int
    bounds: Tensor
    density: Tensor
    starts: Tensor
    copies: dict[torch.device, Cells] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Cells:
        """The same with its tensors on a device."""
        return _on(self, device)

    def member_of(self, x: Tensor) -> Tensor:
        """The number of the division that each of the rows `x` `(rows, n)` takes: int64 `(rows,)`."""
        # In double precision, the order of summation does not show: a sum that it changes in the last bits would have
        # to lie half-way between two neighbours in float32, one of them a bound.
        square = x.double().square().mean(1).float() if x.shape[1] else x.new_zeros(len(x), dtype=torch.float32)
        return (square.unsqueeze(-1) >= self.bounds).sum(-1)

    def cell_of_step(self) -> Tensor:
        """The cell of every step: uint8 `(members, FINE)`."""
        steps = torch.arange(FINE, device=self.starts.device)
        return (steps.unsqueeze(-1) >= self.starts[:, None, 1:]).sum(-1).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class CellTable:
    """What each cell of each division stands for.

    Attributes:
        values: float32 `(members, 2 ** bits)`.
    """

    values: Tensor
    integers: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    copies: dict[torch.device, CellTable] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # values = scale * integers, with a scale for each division: bfloat16 `(members,)` and int8.
        scale = (self.values.abs().amax(1) / 127).bfloat16()
        integers = (self.values / scale.float().clamp(min=1e-38).unsqueeze(1)).round_().clamp_(-127, 127)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "integers", integers.to(torch.int8))

    def on(self, device: torch.device) -> CellTable:
        """The same with its tensors on a device."""
        return _on(self, device)


class CellCodes(NamedTuple):
    """Rows sorted into cells.

    Attributes:
        fields: uint8 `(rows, code_width(n, bits))`; 8 bits: `(rows, n)`.
        member: uint8 `(rows,)`: the number of the division that a row's codes are for.
    """

    fields: Tensor
    member: Tensor


def encode_cells(x: Tensor, cells: Cells) -> CellCodes:
    """Code the rows of `x`; NaN goes to an arbitrary cell.

    Args:
        x: floating point, `(rows, n)`.
        cells: the divisions.
    """
    cells = cells.on(x.device)
    if x.numel() and native.handles(x.device.type, x.shape[1], cells.bits, x.dtype, x.dtype):
        width = code_width(x.shape[1], cells.bits)
        return CellCodes(*native_cells.encode_cells(x, cells.bounds, cells.density, cells.starts, cells.bits, width))
    cell_of_step = None if cells.bits == 8 else cells.cell_of_step().view(-1)
    slices = row_slices(x.shape[0], x.shape[1], x.device)
    return CellCodes(*in_slices(lambda start, stop: _encode(x[start:stop], cells, cell_of_step), slices, x))


def _encode(x: Tensor, cells: Cells, cell_of_step: Tensor | None) -> CellCodes:
    x = x.float() if x.dtype.itemsize < 4 else x
    member = cells.member_of(x)
    steps = (x * cells.density[member].unsqueeze(-1)).add_(FINE // 2).clamp_(0, FINE - 1).to(torch.uint8)
    if cell_of_step is not None:
        at = member.int().mul_(FINE).unsqueeze(-1) + steps
        steps = pack_codes(cell_of_step.index_select(0, at.view(-1)).view(x.shape), cells.bits)
    return CellCodes(steps, member.to(torch.uint8))


def decode_cells(codes: CellCodes, n: int, cells: Cells, table: CellTable, dtype: torch.dtype) -> Tensor:
    """The `table`'s value for the cell of each element.

    Args:
        codes: what `encode_cells` returned, or rows of it.
        n: elements in a row.
        cells: the divisions.
        table: a value for each cell.
        dtype: of the result.

    Returns:
        `(rows, n)` in `dtype`.
    """
    coded, member = codes
    values = table.on(coded.device).values
    if coded.numel() and native.handles(coded.device.type, n, cells.bits, dtype, dtype):
        return native_cells.decode_cells(coded, member, values, n, cells.bits, dtype)
    return look_up_by_row(coded, member, n, cells.bits, values.to(dtype))


def decode_cells_as_integers(codes: CellCodes, n: int, cells: Cells, table: CellTable, kept: Kept | None) -> Integers:
    """As `decode_cells`, with the values as integers and a scale for each row; zero for what is `kept` exactly.

    Args:
        codes, n, table: as for `decode_cells`.
        cells: the divisions, of at most 4 bits.
        kept: see `Integers`.
    """
    coded, member = codes
    table = table.on(coded.device)
    row_scale = table.scale.index_select(0, member.int()).unsqueeze(-1)
    return decode_integers_by_row(coded, member, n, cells.bits, table.integers, row_scale, kept)
