"""Attention masks in memory linear in sequence length, where their form allows.

What masks of transformers let a position attend to is, nearly always, one run of positions: causal, sliding windows,
padding on either side, and all of these at once. Two integers for each row then hold the mask. Any other mask takes
one bit an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from ..compat import is_fake, is_traced
from ..packing import pack_bits, unpack_bits
from .notes import Note


@dataclass(frozen=True)
class MaskLayout:
    """How a packed mask is read.

    Attributes:
        shape: of the mask.
        stored_shape: the same, with 1 for dimensions that it is expanded along.
        dtype: bool (true: attend) or floating point (0: attend; the dtype's lowest value: do not).
        form: `"runs"`: the part is int32 `(2, *stored_shape[:-1])`, where each row's run starts and stops. `"bits"`: it
            is what `pack_bits` returns. `"whole"`: it is the mask.
    """

    shape: torch.Size
    stored_shape: torch.Size
    dtype: torch.dtype
    form: str

    def unpack(self, part: Tensor) -> Tensor:
        """The mask again."""
        if self.form == "whole":
            return part
        attend = _from_runs(part, self.stored_shape[-1]) if self.form == "runs" else self._from_bits(part)
        if self.dtype != torch.bool:
            lowest = torch.finfo(self.dtype).min
            attend = torch.zeros_like(attend, dtype=self.dtype).masked_fill_(attend.logical_not_(), lowest)
        return attend.expand(self.shape)

    def _from_bits(self, part: Tensor) -> Tensor:
        return unpack_bits(part, self.stored_shape[-1]).contiguous()


@dataclass(eq=False)
class PackedMask:
    """A packed mask. Layers that get the same mask share one, for as long as the graph of one of them holds it."""

    layout: MaskLayout
    part: Tensor
    version: int


class _Shared(Note):
    """What a mask is packed as, while a graph holds that."""

    name = "_razor_mask"

    def __init__(self, packed: PackedMask) -> None:
        self.packed = ref(packed)


def pack_mask(mask: Tensor) -> PackedMask:
    """Pack an attention mask.

    To see what form a mask has, its values are read: on an accelerator the host waits for them, once for each mask.

    Args:
        mask: bool or floating point, `(..., length, kv_length)`. Kept whole: one that requires a gradient, and a
            floating-point one with other values than 0 and the dtype's lowest.
    """
    if mask.requires_grad or mask.dim() < 2 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return _whole(mask)
    noted = _Shared.of(mask)
    packed = None if noted is None else noted.packed()
    if packed is None or packed.version != mask._version:
        packed = _pack(mask)
        _Shared(packed).attach(mask)
    return packed


def _pack(mask: Tensor) -> PackedMask:
    if is_traced():
        # The graph is for masks of any values.
        return _bits(mask) if mask.dtype == torch.bool else _whole(mask)
    if is_fake(mask) or mask.is_meta:
        # No values to read. What is estimated on such tensors is to be what is nearly always found on real ones.
        return _runs(mask)
    stored = _without_expanded(mask)
    attend = stored
    if mask.dtype != torch.bool:
        attend = stored == 0
        if not torch.equal(stored != torch.finfo(mask.dtype).min, attend):
            return _whole(mask)
    packed = _runs(mask, attend)
    return packed if torch.equal(_from_runs(packed.part, attend.shape[-1]), attend) else _bits(mask, attend)


def _runs(mask: Tensor, attend: Tensor | None = None) -> PackedMask:
    attend = _without_expanded(mask) if attend is None else attend
    starts = attend.to(torch.uint8).argmax(-1)
    runs = torch.stack([starts, starts + attend.sum(-1)]).int()
    return PackedMask(MaskLayout(mask.shape, attend.shape, mask.dtype, "runs"), runs, mask._version)


def _bits(mask: Tensor, attend: Tensor | None = None) -> PackedMask:
    attend = _without_expanded(mask) if attend is None else attend
    layout = MaskLayout(mask.shape, attend.shape, mask.dtype, "bits")
    return PackedMask(layout, pack_bits(attend), mask._version)


def _whole(mask: Tensor) -> PackedMask:
    return PackedMask(MaskLayout(mask.shape, mask.shape, mask.dtype, "whole"), mask, mask._version)


def _without_expanded(mask: Tensor) -> Tensor:
    """`mask` with 1 for every dimension that all repeats the same memory."""
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _from_runs(runs: Tensor, length: int) -> Tensor:
    positions = torch.arange(length, dtype=torch.int32, device=runs.device)
    start, stop = runs.unsqueeze(-1)
    return (positions >= start).logical_and_(positions < stop)
