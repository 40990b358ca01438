"""Layouts of tensors that are restored from what another operator packed, instead of being packed themselves.

Their parts are those of the tensor they are restored from, followed by their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import (
    CellCodes,
    Cells,
    CellTable,
    Integers,
    Kept,
    Layout,
    Packed,
    RowMap,
    SparseLayout,
    decode_cells,
    decode_cells_as_integers,
    unpack_bits,
)


@dataclass(frozen=True)
class _AffineLayout(Layout):
    """A norm's output gamma * x_hat + beta. Own parts: gamma and beta, each only if there is one.

    Its two kinds say what gamma and beta belong to, and neither is the other: what can be done with a number for each
    column (to apply gamma to a weight's gradient, say) would be wrong with one for each row.
    """

    x_hat: SparseLayout
    has_gamma: bool
    has_beta: bool

    @property
    def shape(self) -> torch.Size:
        """See `Layout.shape`."""
        return self.x_hat.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.x_hat.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.x_hat.matrix

    @property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.x_hat.sliceable

    def split(self, parts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
        """The parts of x_hat, gamma and beta."""
        parts = list(parts)
        beta = parts.pop() if self.has_beta else None
        gamma = parts.pop() if self.has_gamma else None
        return parts, gamma, beta


class ColumnAffineLayout(_AffineLayout):
    """LayerNorm's or RMSNorm's output: gamma and beta are `(columns,)`, a number for each column."""

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """See `Layout.reshaped`."""
        x_hat = self.x_hat.reshaped(shape)
        return None if x_hat is None else replace(self, x_hat=x_hat)

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        parts, gamma, beta = self.split(parts)
        x = self.x_hat.unpack_rows(parts, start, stop, dtype)
        x = x if gamma is None else x * gamma.to(dtype)
        return x if beta is None else x + beta.to(dtype)


class ChannelAffineLayout(_AffineLayout):
    """Batch, group or instance norm's output `(batch, channels, ...)`, with a row for each channel of each sample.

    Gamma and beta are `(channels,)`, so that a row has one number of each.
    """

    def unpack_rows(
        self,
        parts: Sequence[Tensor],
        start: int,
        stop: int,
        dtype: torch.dtype,
        low: float = -inf,
        high: float = inf,
    ) -> Tensor:
        """See `Layout.unpack_rows`.

        Args:
            low: no element is below this.
            high: no element is above this.
        """
        parts, gamma, beta = self.split(parts)
        wide = torch.promote_types(dtype, torch.float32)
        gain, offset = (None if t is None else self._of_rows(t.to(wide), start, stop) for t in (gamma, beta))
        return self.x_hat.unpack_rows(parts, start, stop, dtype, then=RowMap(gain, offset, low, high))

    def _of_rows(self, of_channels: Tensor, start: int, stop: int) -> Tensor:
        """A channel's number for each of the rows from `start` to `stop`."""
        channels = self.shape[1]
        if start % channels or stop % channels:
            return of_channels[torch.arange(start, stop, device=of_channels.device) % channels]
        return of_channels.repeat((stop - start) // channels)


@dataclass(frozen=True)
class RectifiedLayout(Layout):
    """max(x, 0), or that up to `top`, of a norm's output. Own parts: none."""

    x: ChannelAffineLayout
    top: float = inf

    @property
    def shape(self) -> torch.Size:
        """See `Layout.shape`."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.x.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.x.matrix

    @property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.x.sliceable

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        return self.x.unpack_rows(parts, start, stop, dtype, low=0.0, high=self.top)


@dataclass(frozen=True)
class CellLayout(Layout):
    """A function of a tensor of which only the cells are known that its elements lie in. Own parts: `CellCodes`.

    Attributes:
        columns: elements in a row.
        cells: the divisions that a row's cells may be of.
        table: what the function is taken for in each cell.
    """

    shape: torch.Size
    dtype: torch.dtype
    columns: int
    cells: Cells
    table: CellTable

    sliceable = True
    coarse = True

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return (prod(self.shape) // self.columns if self.columns else 0), self.columns

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """See `Layout.reshaped`."""
        return replace(self, shape=shape) if self.columns == shape[-1] else None

    def regrouped(self, parts: Sequence[Tensor], matrix: tuple[int, int]) -> Packed | None:
        """See `Layout.regrouped`."""
        if matrix == self.matrix:
            return Packed(self, tuple(parts))
        rows, columns = matrix
        # Where rows end with a byte, codes run on from row to row. Those of three bits are two planes in each row. Rows
        # that become one may be coded by different divisions.
        if self.cells.bits == 3 or not columns or self.columns % columns or columns * self.cells.bits % 8:
            return None
        fields, member = parts
        return Packed(
            replace(self, columns=columns), (fields.view(rows, -1), member.repeat_interleave(self.columns // columns))
        )

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        fields, member = parts
        codes = CellCodes(fields[start:stop], member[start:stop])
        return decode_cells(codes, self.matrix[1], self.cells, self.table, dtype)

    def integers(self, parts: Sequence[Tensor], kept: Kept | None = None) -> Integers | None:
        """See `Layout.integers`. What is `kept` exactly takes the place of the codes there."""
        if self.cells.bits == 8:
            return None
        return decode_cells_as_integers(CellCodes(*parts[:2]), self.matrix[1], self.cells, self.table, kept)


@dataclass(frozen=True)
class ActivatedLayout(Layout):
    """An elementwise function of a packed tensor. Own parts: none.

    Attributes:
        x: how the function's argument is read.
        function: plain code of torch.
    """

    x: Layout
    function: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> torch.Size:
        """See `Layout.shape`."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.x.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.x.matrix

    @property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.x.sliceable

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        return self.function(_rows(self.x, parts, start, stop, dtype))

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """See `Layout.reshaped`."""
        x = self.x.reshaped(shape)
        return None if x is None else replace(self, x=x)


@dataclass(frozen=True)
class CorrectedLayout(Layout):
    """A coarse tensor with some of its elements exact. Own parts: those of `exact`."""

    base: Layout
    base_parts: int
    exact: SparseLayout

    @property
    def shape(self) -> torch.Size:
        """See `Layout.shape`."""
        return self.exact.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.exact.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.exact.matrix

    @property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.base.sliceable and self.exact.sliceable

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        base = _rows(self.base, parts[: self.base_parts], start, stop, dtype)
        return self.exact.unpack_rows(parts[self.base_parts :], start, stop, dtype, base)

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """See `Layout.reshaped`."""
        base, exact = self.base.reshaped(shape), self.exact.reshaped(shape)
        return None if base is None or exact is None else replace(self, base=base, exact=exact)

    def integers(self, parts: Sequence[Tensor]) -> Integers | None:
        """See `Layout.integers`."""
        if not isinstance(self.base, CellLayout) or not self.exact.keeps_floats_by_row:
            return None
        return self.base.integers(parts, self.exact.kept_parts(parts[self.base_parts :]))


@dataclass(frozen=True)
class DroppedLayout(Layout):
    """A dropout's output. Own part: the mask of what was let through, `(1, ceil(numel / 8))` bytes."""

    x: Layout
    p: float

    # The mask's bits run on from row to row.
    sliceable = False

    @property
    def shape(self) -> torch.Size:
        """See `Layout.shape`."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.x.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.x.matrix

    @property
    def coarse(self) -> bool:
        """See `Layout.coarse`."""
        return self.x.coarse

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """See `Layout.reshaped`."""
        x = self.x.reshaped(shape)
        return None if x is None else replace(self, x=x)

    def regrouped(self, parts: Sequence[Tensor], matrix: tuple[int, int]) -> Packed | None:
        """See `Layout.regrouped`."""
        x = self.x.regrouped(parts[:-1], matrix)
        return None if x is None else Packed(replace(self, x=x.layout), (*x.parts, parts[-1]))

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        kept = unpack_bits(parts[-1], prod(self.shape)).view(self.matrix)
        return (self.x.unpack(parts[:-1], dtype).reshape(self.matrix) * kept).mul_(1 / (1 - self.p))


@dataclass(frozen=True)
class PaddedLayout(Layout):
    """Feature maps with zeros around them. Own parts: none.

    Attributes:
        x: the maps, with a row for each channel.
        spatial: their height and width.
        padding: as `torch.nn.functional.pad` takes it.
    """

    x: Layout
    shape: torch.Size
    spatial: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.x.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.x.matrix[0], prod(self.shape[2:])

    @property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.x.sliceable

    @property
    def coarse(self) -> bool:
        """See `Layout.coarse`."""
        return self.x.coarse

    @property
    def margins(self) -> tuple[int, ...] | None:
        """Zeros on either side in each spatial dimension, the first one first; None if the sides differ."""
        before, after = self.padding[::2], self.padding[1::2]
        if before != after or min(before) < 0:
            return None
        return (0,) * (len(self.spatial) - len(before)) + before[::-1]

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        maps = _rows(self.x, parts, start, stop, dtype).view(-1, *self.spatial)
        return F.pad(maps, self.padding).flatten(1)


@dataclass(frozen=True)
class ProductLayout(Layout):
    """The elementwise product of two tensors, as in a gated MLP. Own parts: none."""

    left: Layout
    left_parts: int
    right: Layout

    coarse = True

    @property
    def shape(self) -> torch.Size:
        """See `Layout.shape`."""
        return self.left.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Layout.dtype`."""
        return self.left.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`."""
        return self.left.matrix

    @property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.left.sliceable and self.right.sliceable

    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `Layout.unpack_rows`."""
        left = _rows(self.left, parts[: self.left_parts], start, stop, dtype)
        return left * _rows(self.right, parts[self.left_parts :], start, stop, dtype)

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """See `Layout.reshaped`."""
        left, right = self.left.reshaped(shape), self.right.reshaped(shape)
        return None if left is None or right is None else replace(self, left=left, right=right)


def gradient_by_rows(
    grad_output: Tensor, layout: Layout, parts: Sequence[Tensor], write: Callable[..., Any] = torch.mul
) -> Tensor:
    """The gradient of an elementwise operator, a few rows at a time.

    Args:
        grad_output: of the layout's shape.
        layout: of what the gradient depends on.
        parts: of this layout.
        write: `write(rows, grad_rows, out=...)` computes some rows of it (default: the product of both).
    """
    result = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    into, grad_rows = result.view(layout.matrix), grad_output.reshape(layout.matrix)
    for start, stop, rows in layout.slices(parts, grad_output.dtype):
        write(rows, grad_rows[start:stop], out=into[start:stop])
    return result


def _rows(layout: Layout, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Some rows of a layout that may have to be unpacked whole, which is so only if all rows are asked for."""
    if layout.sliceable:
        return layout.unpack_rows(parts, start, stop, dtype)
    return layout.unpack(parts, dtype).reshape(layout.matrix)
