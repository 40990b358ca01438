"""One packed copy of a tensor for all its consumers, and for the operator that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from ..packing import Layout, Packed, PackSpec, SparseLayout, pack, sparse_layout
from .layouts import ChannelAffineLayout, ColumnAffineLayout, CorrectedLayout
from .notes import Note


@dataclass
class _Entry(Note):
    """What is known of a dense tensor. It never outlives the tensor it was packed from, so neither a later step nor a
    recomputation under checkpointing can meet a stale copy.

    Attributes:
        version: the tensor's when this was noted; a change in place makes it another tensor.
        origin: how the tensor is restored from what the operator saves that made it.
        copies: how consumers packed it so far, and whether from `origin`.
        cast_from: the tensor that this one is a wider copy of, and the version that it had.
    """

    name = "_razor_entry"

    version: int
    origin: Packed | None = None
    copies: dict[tuple[PackSpec, torch.dtype, bool], Packed] = field(default_factory=dict)
    cast_from: tuple[Tensor, int] | None = None


def _entry(x: Tensor) -> _Entry | None:
    # Tensors from outside of the graph can be written to without a new version (through numpy or `.data`).
    if x.grad_fn is None:
        return None
    entry = _Entry.of(x)
    if entry is None or entry.version != x._version:
        entry = _Entry(x._version)
        entry.attach(x)
    return entry


def note_origin(x: Tensor, origin: Packed) -> None:
    """Let consumers of `x` restore it from what the operator that made it saves anyway."""
    if (entry := _entry(x)) is not None:
        entry.origin = origin


def note_affine(
    y: Tensor,
    x_hat: SparseLayout,
    parts: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    of_channels: bool = False,
) -> None:
    """Let consumers of `y` = gamma x_hat + beta read the norm's x_hat.

    Args:
        y: the norm's output.
        x_hat: layout of the packed x_hat.
        parts: of x_hat.
        gamma: a number for each column, or None: 1.
        beta: as gamma, or None: 0.
        of_channels: gamma and beta have a number for each channel instead, and x_hat a row for each.
    """
    # Copies: the consumer's backward may run while the norm's own parameters are sharded away (FSDP, ZeRO).
    scales = tuple(x.detach().clone() for x in (gamma, beta) if x is not None)
    kind = ChannelAffineLayout if of_channels else ColumnAffineLayout
    note_origin(y, Packed(kind(x_hat, gamma is not None, beta is not None), (*parts, *scales)))


def note_cast(y: Tensor, x: Tensor) -> None:
    """Let consumers of `y`, which is `x` in a dtype that holds all of its values, share the packed copies of `x`."""
    entry = _entry(y)
    if entry is not None and x.grad_fn is not None and torch.promote_types(x.dtype, y.dtype) == y.dtype:
        entry.origin = origin_of(x)
        entry.cast_from = x, x._version


def origin_of(x: Tensor) -> Packed | None:
    """How `x` is restored from what the operator that made it saves; None if that is not known."""
    entry = _Entry.of(x)
    if entry is not None and entry.version == x._version and entry.origin is not None:
        return entry.origin
    base = _same_rows(x)
    origin = None if base is None else origin_of(base)
    layout = None if origin is None else origin.layout.reshaped(x.shape)
    return None if origin is None or layout is None else Packed(layout, origin.parts)


def _same_rows(x: Tensor) -> Tensor | None:
    """The tensor that `x` is a view of, with the same rows in the same order; None if it is none."""
    base = x._base
    if base is None or base.dtype != x.dtype or base.shape[-1:] != x.shape[-1:] or base.numel() != x.numel():
        return None
    return base if x.is_contiguous() and base.is_contiguous() else None


def _shares_with_views(base: Tensor, shape: torch.Size, spec: PackSpec, dtype: torch.dtype) -> bool:
    """Whether `base` is packed for others, and its packed copies can be read in this shape."""
    if _Entry.of(base) is None or base.grad_fn is None:
        return False
    origin = origin_of(base)
    read = sparse_layout(base.shape, dtype, spec).reshaped(shape) is not None
    return read and (origin is None or origin.layout.reshaped(shape) is not None)


def pack_shared(x: Tensor, spec: PackSpec, dtype: torch.dtype | None = None, derived: bool = True) -> Packed:
    """Pack `x`, or return a copy that is there already.

    That is the copy that an earlier consumer packed in the same way. Or, if `spec` wants codes for what is not kept
    exactly, what the operator that made `x` saves: a norm's x_hat as it is; the pre-activation that an activation
    function saves with the greatest elements of `x` exact on top.

    Args:
        x: any floating-point tensor; shared if it has a `grad_fn`. A change in place since it was packed is noticed.
        spec: how to pack it.
        dtype: cast to this before packing (default: the dtype of `x`), as the consumer's own computation does.
        derived: whether what the operator that made `x` saves may serve. Not for who computes much from `x`: a norm's
            x_hat in 3 bits is enough for a weight's gradient, and not for a module that is computed again.
    """
    dtype = dtype or x.dtype
    entry = _entry(x)
    if entry is None:
        packed = pack(x.detach().to(dtype), spec)
        # Products of torch save such an input as they lay it out, so that it may be changed later.
        rearranged = packed.layout.whole and x.dim() > 2 and not x.is_contiguous()
        return Packed(packed.layout, (packed.parts[0].clone(),)) if rearranged and x.dim() < 4 else packed
    # Model code flattens tokens, after a norm and before it sends them to experts.
    base = _same_rows(x)
    if base is not None and _shares_with_views(base, x.shape, spec, dtype):
        packed = pack_shared(base, spec, dtype, derived)
        return Packed(cast(Layout, packed.layout.reshaped(x.shape)), packed.parts)
    if spec.bits and entry.cast_from is not None:
        source, version = entry.cast_from
        if source._version == version:
            return pack_shared(source, spec, derived=derived)
    derived = derived and bool(spec.bits) and entry.origin is not None
    key = (spec, dtype, derived)
    if key not in entry.copies:
        dense = x.detach().to(dtype)
        origin = None
        if derived and entry.origin is not None:
            # In the rows that the consumer reads: tokens, or feature maps.
            origin = entry.origin.layout.regrouped(entry.origin.parts, sparse_layout(x.shape, x.dtype, spec).matrix)
        if origin is None:
            entry.copies[key] = _alone(x, pack(dense, spec))
        else:
            entry.copies[key] = _correct(origin, dense, spec)
    return entry.copies[key]


def _alone(x: Tensor, packed: Packed) -> Packed:
    """`packed`, without the rest of the memory that `x`, where it is stored as it is, may be a small part of.

    A pooler reads the first token of each text, a view that keeps all of them alive: 48 of the 811 MiB that a BERT-base
    saves for 32 texts of 512 tokens.
    """
    if not packed.layout.whole:
        return packed
    (part,) = packed.parts
    if part.untyped_storage().nbytes() <= 2 * part.numel() * part.element_size():
        return packed
    # Part of the graph, as `x` would be (see `saved_parts`).
    return Packed(packed.layout, (x.clone() if part.dtype == x.dtype else part.clone(),))


def _correct(origin: Packed, x: Tensor, spec: PackSpec) -> Packed:
    """`origin`, with the elements of `x` exact that `spec` keeps, where it has not got them."""
    if not origin.layout.coarse:
        return origin
    exact = pack(x, replace(spec, bits=0, rotated=False))
    layout = CorrectedLayout(origin.layout, len(origin.parts), cast(SparseLayout, exact.layout))
    return Packed(layout, origin.parts + exact.parts)
