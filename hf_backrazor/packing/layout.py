"""How to read a packed tensor, whatever it is packed as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from math import inf, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..shapes_only import is_shape_only, turns
from .integers import Integers

# Elements that are packed or unpacked at a time: what a slice needs besides (magnitudes, masks, positions: some 30
# bytes an element) is then bounded, instead of being the peak of a training step. On a CPU it stays near the cache as
# well; other devices need more work at a time.
SLICE_NUMEL = {"cpu": 2**19}
SLICE_NUMEL_ELSEWHERE = 2**24

# Unpacking needs less besides, and a matrix product in slices wants them thick: the gradient of a weight of 768 x 3072
# for 1576 tokens takes 49 ms from slices of 2^19 elements, 46 from 2^21, and 43 from a dense input.
UNPACK_NUMEL = {"cpu": 2**21}


class Layout(ABC):
    """What is known of a packed tensor from shapes, dtypes and settings alone; it holds no tensor.

    Attributes:
        shape: of the dense tensor.
        dtype: of the dense tensor.
    """

    if TYPE_CHECKING:  # fields of some layouts, properties of others

        @property
        def shape(self) -> torch.Size: ...
        @property
        def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def sliceable(self) -> bool:
        """Whether some of the rows can be unpacked without the others."""

    @property
    def whole(self) -> bool:
        """Whether the tensor is kept as it is."""
        return False

    @property
    def coarse(self) -> bool:
        """Whether not even the elements of greatest magnitude are kept exactly."""
        return False

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the tensor seen as a matrix; by default with its last dimension in the columns."""
        width = self.shape[-1] if self.shape else 1
        return (prod(self.shape[:-1]) if self.shape else 1), width

    @abstractmethod
    def unpack_rows(self, parts: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The rows from `start` to `stop`, `(stop - start, columns)` in `dtype`, of a layout that is `sliceable`.

        Of one that is not, these are all rows, and `start` and `stop` must say so.
        """

    def regrouped(self, parts: Sequence[Tensor], matrix: tuple[int, int]) -> Packed | None:
        """The same tensor, packed, with other rows and columns, without a copy; None if that cannot be."""
        return Packed(self, tuple(parts)) if matrix == self.matrix else None

    def reshaped(self, shape: torch.Size) -> Layout | None:
        """The layout of the same parts, of a tensor of this shape whose last dimension is as it was; None if there is
        none.
        """
        return None

    def integers(self, parts: Sequence[Tensor]) -> Integers | None:
        """The tensor as a matrix of integers; None if it is not coded in a way that allows for that."""
        return None

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor, of `shape`, in `dtype` (default: the one that it had)."""
        wanted = dtype or self.dtype
        (dense,) = in_slices(
            lambda start, stop: (self.unpack_rows(parts, start, stop, wanted),), self._bounds(parts), parts[0]
        )
        return dense.reshape(self.shape)

    def slices(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Unpack a few rows at a time: their start, their stop, and they, `(stop - start, columns)`.

        In an estimate, not to the end (see `turns`).
        """
        for start, stop in turns(self._bounds(parts), parts[0]):
            yield start, stop, self.unpack_rows(parts, start, stop, dtype)

    def _bounds(self, parts: Sequence[Tensor]) -> Sequence[tuple[int, int]]:
        """Of the slices that it is unpacked in."""
        device = parts[0].device
        numel = UNPACK_NUMEL.get(device.type)
        return row_slices(*self.matrix, device, numel) if self.sliceable else ((0, self.matrix[0]),)


class RowMap(NamedTuple):
    """What becomes of rows while they are unpacked: gain x + offset, limited.

    Attributes:
        gain: a number for each row, float32 or wider, or None: 1.
        offset: as `gain`, or None: 0.
        low: no element is below this.
        high: no element is above this.
    """

    gain: Tensor | None = None
    offset: Tensor | None = None
    low: float = -inf
    high: float = inf

    def __call__(self, rows: Tensor) -> Tensor:
        """The rows `(n, columns)` as they become, in their dtype."""
        x = rows if self.gain is None else rows * self.gain.unsqueeze(-1)
        x = x if self.offset is None else x + self.offset.unsqueeze(-1)
        x = x if (self.low, self.high) == (-inf, inf) else x.clamp(self.low, self.high)
        return x.to(rows.dtype)


UNCHANGED = RowMap()


class Packed(NamedTuple):
    """A packed tensor: how to read it, and the plain tensors that hold it."""

    layout: Layout
    parts: tuple[Tensor, ...]

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor again, in `dtype` (default: the one it had)."""
        return self.layout.unpack(self.parts, dtype)


def row_slices(rows: int, columns: int, device: torch.device, numel: int | None = None) -> tuple[tuple[int, int], ...]:
    """Bounds of slices that have about `numel` elements (default: as many as are packed at a time); at least one."""
    return _row_slices(rows, columns, numel or SLICE_NUMEL.get(device.type, SLICE_NUMEL_ELSEWHERE))


@lru_cache(maxsize=2**12)
def _row_slices(rows: int, columns: int, numel: int) -> tuple[tuple[int, int], ...]:
    # Multiples of 8 rows, for the sake of matrix products.
    step = max(8, numel // max(columns, 1) // 8 * 8)
    return tuple((start, min(start + step, rows)) for start in range(0, rows, step)) or ((0, 0),)


def in_slices(
    function: Callable[[int, int], tuple[Tensor, ...]], slices: Sequence[tuple[int, int]], x: Tensor
) -> tuple[Tensor, ...]:
    """What `function(start, stop)` gives for each of the `slices` of `x`, one below the other.

    If `x` is a tensor of an estimate, only the first slice and one after all others, of the same size, are computed:
    what is held at a time is the same (see `turns`).

    Args:
        function: gives tensors with one row for each row of the slice.
        slices: bounds, from `row_slices`.
        x: what they are slices of.
    """
    if len(slices) > 2 and is_shape_only(x):
        (_, step), (_, stop) = slices[0], slices[-1]
        first = function(0, step)
        between = tuple(part.new_empty((stop - 2 * step, *part.shape[1:])) for part in first)
        results = [first, between, function(step, 2 * step)]
    else:
        results = [function(start, stop) for start, stop in slices]
    return results[0] if len(results) == 1 else tuple(torch.cat(parts) for parts in zip(*results, strict=True))
