"""One packed copy of a tensor for all its consumers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..packing import Packed, PackSpec, pack


class _Entry(NamedTuple):
    version: int
    spec: PackSpec
    dtype: torch.dtype
    packed: Packed


# Keyed by the identity of the dense tensor and gone with it: an entry never outlives the tensor it was packed from, so
# neither a later step nor a recomputation under checkpointing can meet a stale copy.
_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def pack_shared(x: Tensor, spec: PackSpec, dtype: torch.dtype | None = None) -> Packed:
    """Pack `x`, or return the copy that an earlier consumer of the same tensor packed in the same way.

    Args:
        x: any floating-point tensor; shared if it has a `grad_fn`. A change in place since it was packed is noticed.
        spec: how to pack it.
        dtype: cast to this before packing (default: the dtype of `x`), as the consumer's own computation does.
    """
    dtype = dtype or x.dtype
    # Tensors from outside of the graph can be written to without a new version (through numpy or `.data`). And the
    # compiler merges equal subgraphs by itself, but cannot trace the dictionary.
    if x.grad_fn is None or torch.compiler.is_compiling():
        return pack(x.detach().to(dtype), spec)
    entry = _shared.get(x)
    if entry is not None and entry[:3] == (x._version, spec, dtype):
        return entry.packed
    packed = pack(x.detach().to(dtype), spec)
    _shared[x] = _Entry(x._version, spec, dtype, packed)
    return packed
