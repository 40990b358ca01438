"""A saved activation as it is stored: a few elements exactly, the rest coarsely or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..kernels import rows as native
from .bits import code_width
from .codes import CODE_BITS, Codes, decode, encode, levels_of, thresholds_of
from .index import encode_index, index_bytes, index_coding, index_dtype, scatter_kept
from .integers import Integers, Kept, decode_integers
from .layout import UNCHANGED, Layout, Packed, RowMap, in_slices, row_slices
from .select import kept_count, topk_mask


@dataclass(frozen=True)
class PackSpec:
    """How tensors are packed.

    Attributes:
        sparsity: fraction of the elements that are not kept exactly; 0 keeps all, 1 none.
        granularity: the set that top-k runs over: `"row"` (last dimension), `"sample"` (one item of the first
            dimension), `"tensor"`.
        bits: bits of code for what top-k leaves over (one of `CODE_BITS`), or 0: it unpacks to zero.
        value_dtype: dtype of the elements kept exactly: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"`, `"int8"`.
            Never wider than the tensor itself. `"auto"`: the tensor's own at sparsity 0, otherwise its own if that
            has 16 bits and bfloat16 if it has more.
        levels: `"gaussian"` or `"even"` (see `encode`).
        centred: store the mean over the second-to-last dimension (tokens), and pack what each row deviates from it.
        row_dims: how many of the last dimensions make a row: 1 for tokens; 2 for feature maps `(batch, channels,
            height, width)`, whose width alone would make short rows.
        rotated: turn what top-k leaves of a row before it is coded (see `rotation`). For sets that are rows.
    """

    sparsity: float = 0.0
    granularity: str = "row"
    bits: int = 0
    value_dtype: str = "auto"
    levels: str = "gaussian"
    centred: bool = False
    row_dims: int = 1
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.bits and self.bits not in CODE_BITS:
            raise ValueError(f"bits={self.bits!r}: must be 0 or one of {CODE_BITS}")
        if self.rotated and (self.granularity != "row" or not 1 <= self.bits <= 4):
            raise ValueError(
                f"rotated=True with granularity={self.granularity!r}, bits={self.bits!r}: must be "
                "granularity='row' and 1 to 4 bits"
            )


# One object for all equal ones: making one takes 3 microseconds, and to compare it with itself none.
pack_spec = lru_cache(maxsize=2**10)(PackSpec)


@dataclass(frozen=True)
class SparseLayout(Layout):
    """The layout of what `pack` returns.

    The parts, in order, each only where the layout has it: means `(groups, columns)`; kept values `(sets, k)`; the
    scale of int8 values `(sets, 1)`; index `(sets, ...)` (see `index_coding`); scale of the codes `(rows, 1)`; codes
    `(rows, ...)` (see `Codes`). With all kept in the tensor's own dtype, the only part is the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    spec: PackSpec

    @cached_property
    def sliceable(self) -> bool:
        """See `Layout.sliceable`."""
        return self.spec.granularity == "row" or self.whole

    @cached_property
    def whole(self) -> bool:
        """Whether the tensor is kept as it is."""
        return self.kept > 0 and self.coding == "none" and self.value_dtype == self.dtype and not self.spec.centred

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """See `Layout.matrix`; with `row_dims` dimensions in the columns."""
        if not self.shape:
            return 1, 1
        return prod(self.shape[: -self.spec.row_dims]), prod(self.shape[-self.spec.row_dims :])

    @cached_property
    def sets(self) -> int:
        """Number of sets that top-k runs over."""
        if self.spec.granularity == "tensor" or len(self.shape) < 2:
            return 1
        return self.shape[0] if self.spec.granularity == "sample" else self.matrix[0]

    @cached_property
    def set_size(self) -> int:
        """Elements in each set."""
        return prod(self.shape) // self.sets if self.sets else 0

    @cached_property
    def kept(self) -> int:
        """Elements kept exactly in each set."""
        return kept_count(self.set_size, self.spec.sparsity)

    @cached_property
    def coding(self) -> str:
        """How the places of the kept elements are stored: see `index_coding`."""
        return index_coding(self.set_size, self.kept)

    @cached_property
    def value_dtype(self) -> torch.dtype:
        """dtype that kept values are stored in."""
        wanted = self.spec.value_dtype
        if wanted == "int8":
            return torch.int8
        if wanted == "auto":
            if self.spec.sparsity == 0 or self.dtype.itemsize <= 2:
                return self.dtype
            return torch.bfloat16
        wanted = getattr(torch, wanted)
        return wanted if wanted.itemsize < self.dtype.itemsize else self.dtype

    @cached_property
    def group(self) -> int:
        """Rows that share a mean: the second-to-last dimension."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    def reshaped(self, shape: torch.Size) -> SparseLayout | None:
        """See `Layout.reshaped`."""
        by_row = self.spec.granularity == "row" and self.spec.row_dims == 1 and not self.spec.centred
        return sparse_layout(shape, self.dtype, self.spec) if by_row and not self.whole else None

    def unpack_rows(
        self,
        parts: Sequence[Tensor],
        start: int,
        stop: int,
        dtype: torch.dtype,
        base: Tensor | None = None,
        then: RowMap = UNCHANGED,
    ) -> Tensor:
        """See `Layout.unpack_rows`.

        Args:
            base: `(stop - start, columns)`, written to: takes the place of the zeros that elements not kept unpack to.
            then: what becomes of these rows.
        """
        if self.whole:
            return then(parts[0].reshape(self.matrix)[start:stop].to(dtype))
        means = None
        if self.spec.centred:
            means, *parts = parts
        part = self
        if (start, stop) != (0, self.matrix[0]):
            part = self._of_rows(stop - start)
            parts = [x[start:stop] for x in parts]
        if part.is_compiled(parts, dtype):
            return part._unpack_natively(parts, dtype, base, means, self.group, start, then)
        dense = part._unpack(parts, dtype, base)
        # Not in place: with all kept, `dense` may be what is stored.
        return then(dense if means is None else dense + _of_rows(means, self.group, start, stop).to(dtype))

    def _of_rows(self, rows: int) -> SparseLayout:
        """The layout of so many of the rows, as a matrix."""
        return sparse_layout(torch.Size((rows, self.matrix[1])), self.dtype, replace(self.spec, row_dims=1))

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """See `Layout.unpack`."""
        if self.is_compiled(parts, dtype or self.dtype):
            return self.unpack_rows(parts, 0, self.matrix[0], dtype or self.dtype).view(self.shape)
        return super().unpack(parts, dtype)

    def add_to(self, parts: Sequence[Tensor], into: Tensor, sign: int = 1) -> None:
        """Add the tensor to another one, or subtract it: `into.add_(self.unpack(parts, torch.float32), alpha=sign)`.

        No dense tensor is made on the way, but for a few rows where nothing was compiled.

        Args:
            parts: of this layout.
            into: contiguous, float32 or float64, with as many elements; changed in place.
            sign: 1 or -1.

        Raises:
            ValueError: `into` is not contiguous.
        """
        if not into.is_contiguous():
            raise ValueError(f"add_to takes contiguous tensors to add to, got strides {into.stride()}")
        into = into.view(self.matrix)
        if into.dtype != torch.float32 or not self.is_compiled(parts, torch.float32):
            for start, stop, dense in self.slices(parts, torch.float32):
                into[start:stop].add_(dense, alpha=sign)
            return
        means = None
        if self.spec.centred:
            means, *parts = parts
        native.accumulate(into, *self._read(parts, means, self.group, 0), sign)
        if not into.is_inference():
            # What autograd has saved of it is no longer there.
            torch.autograd.graph.increment_version(into)

    def integers(self, parts: Sequence[Tensor]) -> Integers | None:
        """See `Layout.integers`."""
        if not 1 <= self.spec.bits <= 4 or self.spec.centred or not self.keeps_floats_by_row:
            return None
        if self.spec.rotated:
            # The codes are those of another matrix.
            return None
        scale, fields = parts[-2:]
        levels = levels_of(self.spec.bits, self.spec.levels)
        return decode_integers(fields, self.matrix[1], self.spec.bits, levels, scale, self.kept_parts(parts))

    @cached_property
    def keeps_floats_by_row(self) -> bool:
        """Whether each row is a set of its own, of which some elements are kept as floats, or none."""
        some = self.coding != "none" and self.value_dtype != torch.int8
        return self.by_row and (some or self.kept == 0)

    def kept_parts(self, parts: Sequence[Tensor]) -> Kept | None:
        """The elements kept exactly, of a layout that `keeps_floats_by_row` and is not centred."""
        return Kept(parts[0], parts[1], self.coding) if self.kept else None

    @cached_property
    def _compilable(self) -> bool:
        """Whether `kernels.rows` knows such layouts: something is selected or coded, and codes go by rows."""
        selects = self.coding != "none" or (self.kept == 0 and self.spec.bits > 0)
        return selects and self.set_size > 0 and (self.by_row or not (self.spec.bits or self.spec.centred))

    def _handled(self, device: torch.device, dtype: torch.dtype) -> bool:
        return native.handles(device.type, self.set_size, self.spec.bits, dtype, self.value_dtype)

    def is_compiled(self, parts: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether compiled primitives read these parts, and give this dtype."""
        return self._compilable and self._handled(parts[0].device, dtype)

    def split(self, parts: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Kept values, index (as bytes), scale and codes, None for what there is not, of a layout that is compiled.

        A centred one's means are not among the `parts`.
        """
        values, index = (parts[0], parts[1].view(torch.uint8)) if self.kept else (None, None)
        scale, fields = parts[-2:] if self.spec.bits else (None, None)
        return values, index, scale, fields

    @cached_property
    def by_row(self) -> bool:
        """Whether each row is a set of its own."""
        return self.sets == self.matrix[0]

    def _unpack_natively(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype,
        base: Tensor | None,
        means: Tensor | None,
        group: int,
        first: int,
        then: RowMap,
    ) -> Tensor:
        dense = native.unpack(
            *self._read(parts, means, group, first),
            None if self.spec.bits or base is None else base.reshape(self.sets, self.set_size),
            *(None if t is None else t.float() for t in (then.gain, then.offset)),
            then.low,
            then.high,
            dtype,
        )
        return dense.view(self.matrix)

    def _read(self, parts: Sequence[Tensor], means: Tensor | None, group: int, first: int) -> tuple[Any, ...]:
        """The arguments that say how compiled primitives read these rows: see `kernels.rows.unpack`."""
        bits = self.spec.bits
        return (
            *self.split(parts),
            means,
            group,
            first % group,
            self.sets,
            self.set_size,
            self.kept,
            self.coding,
            bits,
            levels_of(bits, self.spec.levels) if bits else (),
            self.spec.rotated,
        )

    def _unpack(self, parts: Sequence[Tensor], dtype: torch.dtype, base: Tensor | None) -> Tensor:
        remaining = list(parts)
        values = index = None
        if self.kept:
            values = remaining.pop(0)
            if self.value_dtype == torch.int8:
                values = values.to(dtype).mul_(remaining.pop(0).to(dtype))
            values = values.to(dtype)
            if self.coding == "none":
                return values.view(self.matrix)
            index = remaining.pop(0)
        if self.spec.bits:
            spec = self.spec
            dense = decode(Codes(*remaining), spec.bits, self.matrix[1], dtype, spec.levels, spec.rotated).contiguous()
        elif base is not None:
            dense = base.contiguous()
        else:
            dense = torch.zeros(self.matrix, dtype=dtype, device=parts[0].device)
        if values is not None and index is not None:
            dense = scatter_kept(dense.view(self.sets, self.set_size), index, values, self.coding)
        return dense.view(self.matrix)


@lru_cache(maxsize=2**12)
def sparse_layout(shape: torch.Size, dtype: torch.dtype, spec: PackSpec) -> SparseLayout:
    """How `pack` packs such a tensor; one object for all of them, that works out its attributes once."""
    return SparseLayout(shape, dtype, spec)


def pack(x: Tensor, spec: PackSpec, mean: Tensor | None = None, rstd: Tensor | None = None) -> Packed:
    """Pack a floating-point tensor of any shape.

    With sparsity 0 and a value dtype that is the tensor's own, the only part is `x` itself, not a copy.

    Args:
        x: the tensor.
        spec: how to pack it.
        mean: one number for each row, `(*x.shape[:-1], 1)` (with `row_dims=2`, `(*x.shape[:-2], 1, 1)`), in a dtype of
            at least 32 bits; None: 0.
        rstd: as `mean`; if given, (x - mean) rstd is packed instead, rounded to the dtype of `x`.

    Raises:
        TypeError: `x` is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"pack takes floating-point tensors, got {x.dtype}")
    x = x.detach()
    layout = sparse_layout(x.shape, x.dtype, spec)
    compilable = layout._compilable and x.numel() > 0 and layout._handled(x.device, x.dtype)
    if compilable and layout.by_row:
        return _pack_natively(x, layout, mean, rstd)
    if rstd is not None:
        wide = x.to(rstd.dtype)
        x = (wide * rstd if mean is None else (wide - mean).mul_(rstd)).to(x.dtype)
    if compilable:
        return _pack_natively(x, layout)
    if layout.whole:
        return Packed(layout, (x,))
    matrix = x.reshape(layout.matrix)
    means = (_means(x),) if spec.centred else ()
    slices = row_slices(*layout.matrix, x.device) if layout.sliceable else ((0, layout.matrix[0]),)

    def packed(start: int, stop: int) -> tuple[Tensor, ...]:
        part = layout if len(slices) == 1 else layout._of_rows(stop - start)
        rows = matrix[start:stop]
        if means:
            rows = rows - _of_rows(means[0], layout.group, start, stop)
        return _parts(rows, part)

    return Packed(layout, means + in_slices(packed, slices, x))


def _pack_natively(x: Tensor, layout: SparseLayout, mean: Tensor | None = None, rstd: Tensor | None = None) -> Packed:
    spec, n, k = layout.spec, layout.set_size, layout.kept
    means = (_means(x),) if spec.centred else ()
    values, index, scale, fields = native.pack(
        x,
        mean,
        rstd,
        *(means or (None,)),
        layout.group,
        n,
        k,
        layout.coding,
        index_bytes(n, k, layout.coding),
        spec.bits,
        code_width(n, spec.bits) if spec.bits else 0,
        spec.levels == "even",
        thresholds_of(spec.bits, spec.levels) if spec.bits else (),
        levels_of(spec.bits, spec.levels)[: 2 ** (spec.bits - 1)] if spec.bits else (),
        spec.rotated,
        layout.value_dtype,
    )
    kept = (values, index.view(index_dtype(n, layout.coding))) if k else ()
    codes = (scale, fields) if spec.bits else ()
    return Packed(layout, means + kept + codes)


def _means(x: Tensor) -> Tensor:
    """Means over the second-to-last dimension, `(groups, columns)`, as they are stored."""
    mean = (x if x.dim() > 1 else x.view(1, -1)).mean(-2).reshape(-1, x.shape[-1] if x.dim() else 1)
    # What is subtracted is what will be added, rounded as it is stored.
    return mean.to(torch.bfloat16) if x.dtype.itemsize > 2 else mean


def _of_rows(means: Tensor, group: int, start: int, stop: int) -> Tensor:
    """The mean that belongs to each of the rows from `start` to `stop`."""
    return means.index_select(0, torch.arange(start, stop, device=means.device) // group)


def _parts(x: Tensor, layout: SparseLayout) -> tuple[Tensor, ...]:
    """The parts that hold the matrix `x`."""
    sets = x.reshape(layout.sets, layout.set_size)
    if layout.kept and layout.coding == "none":
        return _store_values(sets, layout)
    parts: list[Tensor] = []
    keep = None
    if layout.kept:
        keep = topk_mask(sets, layout.kept)
        # Not `sets[keep]`: how many are kept is known beforehand, and need not be read back from a device.
        columns = torch.nonzero_static(keep, size=layout.sets * layout.kept)[:, 1]
        positions = columns.contiguous().view(layout.sets, layout.kept)
        parts += _store_values(sets.gather(-1, positions), layout)
        parts.append(encode_index(keep, positions, layout.coding))
        keep = keep.view(layout.matrix)
    if layout.spec.bits:
        parts += encode(x, layout.spec.bits, keep, layout.spec.levels, layout.spec.rotated)
    if not parts:
        # An empty tensor, or one of which nothing is kept: a part still says on which device to unpack.
        parts.append(x.new_empty(0))
    return tuple(parts)


def _store_values(values: Tensor, layout: SparseLayout) -> tuple[Tensor, ...]:
    """Kept values `(sets, k)` in the layout's value dtype, with their scale where that is int8."""
    if layout.value_dtype != torch.int8:
        return (values.to(layout.value_dtype),)
    codes = encode(values, 8)
    return codes.fields, codes.scale
