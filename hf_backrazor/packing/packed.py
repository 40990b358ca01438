"""A saved activation as it is stored: a few elements exactly, the rest coarsely or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import pack_bits, packed_width, unpack_bits
from .codes import CODE_BITS, Codes, decode, encode
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
    """

    sparsity: float = 0.0
    granularity: str = "row"
    bits: int = 0
    value_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.bits and self.bits not in CODE_BITS:
            raise ValueError(f"bits={self.bits!r}: must be 0 or one of {CODE_BITS}")


class Packed(NamedTuple):
    """A packed tensor: how to read it, and the plain tensors that hold it."""

    layout: Layout
    parts: tuple[Tensor, ...]

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor again, in `dtype` (default: the one it had)."""
        return self.layout.unpack(self.parts, dtype)


@dataclass(frozen=True)
class Layout:
    """What is known of a packed tensor from its shape, dtype and `PackSpec` alone; it holds no tensor.

    The parts, in order, each only where the layout has it: kept values `(sets, k)`; the scale of int8 values
    `(sets, 1)`; index; scale of the codes `(rows, 1)`; codes (see `Codes`). The index is a bit mask
    `(sets, ceil(n / 8))`, or positions `(sets, k)` as int16 or int32, whichever is smallest.
    """

    shape: torch.Size
    dtype: torch.dtype
    spec: PackSpec

    @property
    def sets(self) -> int:
        """Number of sets that top-k runs over."""
        if self.spec.granularity == "tensor" or len(self.shape) < 2:
            return 1
        return self.shape[0] if self.spec.granularity == "sample" else prod(self.shape[:-1])

    @property
    def set_size(self) -> int:
        """Elements in each set."""
        return prod(self.shape) // self.sets if self.sets else 0

    @property
    def kept(self) -> int:
        """Elements kept exactly in each set."""
        return kept_count(self.set_size, self.spec.sparsity)

    @property
    def rows(self) -> tuple[int, int]:
        """Shape of the tensor as a matrix whose rows share a code scale."""
        width = self.shape[-1] if self.shape else 1
        return (prod(self.shape) // width if width else 0), width

    @property
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

    @property
    def index_dtype(self) -> torch.dtype | None:
        """None where all or nothing is kept; bool for a bit mask; int16 or int32 for positions."""
        n, k = self.set_size, self.kept
        if k in (0, n):
            return None
        positions, bytes_each = (torch.int16, 2) if n <= torch.iinfo(torch.int16).max + 1 else (torch.int32, 4)
        return positions if bytes_each * k < packed_width(n, 1) else torch.bool

    def unpack(self, parts: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Read `parts` into a dense tensor of `shape`, in `dtype` (default: the one the tensor had)."""
        dtype = dtype or self.dtype
        remaining = list(parts)
        values = None
        if self.kept:
            values = remaining.pop(0)
            if self.value_dtype == torch.int8:
                values = values.to(dtype).mul_(remaining.pop(0).to(dtype))
            values = values.to(dtype)
            if self.index_dtype is None:
                return values.view(self.shape)
        index = remaining.pop(0) if values is not None else None
        if self.spec.bits:
            _rows, width = self.rows
            dense = decode(Codes(*remaining), self.spec.bits, width, dtype).contiguous()
        else:
            dense = torch.zeros(self.shape, dtype=dtype, device=parts[0].device)
        if values is not None:
            dense = dense.view(self.sets, self.set_size)
            if self.index_dtype == torch.bool:
                dense.masked_scatter_(unpack_bits(index, self.set_size), values)
            else:
                dense.scatter_(-1, index.long(), values)
        return dense.view(self.shape)


def pack(x: Tensor, spec: PackSpec) -> Packed:
    """Pack a floating-point tensor of any shape.

    With sparsity 0 and a value dtype that is the tensor's own, the only part is `x` itself, not a copy.

    Raises:
        TypeError: `x` is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"pack takes floating-point tensors, got {x.dtype}")
    x = x.detach()
    layout = Layout(x.shape, x.dtype, spec)
    if layout.index_dtype is None and layout.kept:
        if layout.value_dtype == x.dtype:
            return Packed(layout, (x,))
        return Packed(layout, _store_values(x.reshape(layout.sets, layout.set_size), layout))
    parts: list[Tensor] = []
    keep = None
    if layout.kept:
        sets = x.reshape(layout.sets, layout.set_size)
        keep = topk_mask(sets, layout.kept)
        # Not `sets[keep]`: how many are kept is known beforehand, and need not be read back from a device.
        positions = torch.nonzero_static(keep, size=layout.sets * layout.kept)[:, 1].view(layout.sets, layout.kept)
        parts += _store_values(sets.gather(-1, positions), layout)
        parts.append(pack_bits(keep) if layout.index_dtype == torch.bool else positions.to(layout.index_dtype))
    if spec.bits:
        parts += encode(x.reshape(layout.rows), spec.bits, None if keep is None else keep.view(layout.rows))
    if not parts:
        # An empty tensor, or one of which nothing is kept: a part still says on which device to unpack.
        parts.append(x.new_empty(0))
    return Packed(layout, tuple(parts))


def _store_values(values: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Kept values `(sets, k)` in the layout's value dtype, with their scale where that is int8."""
    if layout.value_dtype != torch.int8:
        return (values.to(layout.value_dtype),)
    codes = encode(values, 8)
    return codes.fields, codes.scale
