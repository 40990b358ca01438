"""What autograd saves for backward, as it does so."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .compat import DisableTorchFunctionSubclass, address_of, indices_and_values


@contextmanager
def noting_saved(note: Callable[[Tensor], Callable[[], None]], known: Iterable[Tensor]) -> Iterator[None]:
    """Inside this context `note` is called for every tensor that is saved and not `known`, once for each storage.

    Of a sparse tensor, it is called for those that hold its indices and values.

    What it returns is called if the storage dies inside of the context, with the part of the graph that held it: DoRA
    drops some of what its forward saves. Another storage may then come to lie at the same address.
    """
    seen = {storage_key(part) for x in known for part in strided_parts(x)}
    watched: list[weakref.finalize] = []

    def see(part: Tensor) -> None:
        if (key := storage_key(part)) not in seen:
            seen.add(key)
            watched.append(weakref.finalize(part.untyped_storage(), _forget, seen, key, note(part)))

    try:
        with seeing_saved(see):
            yield
    finally:
        for each in watched:
            each.detach()


def seeing_saved(see: Callable[[Tensor], None]) -> AbstractContextManager:
    """A context in which `see` is called with each tensor that is saved, each time; with the parts of sparse ones."""

    def pack(x: Tensor) -> Tensor:
        for part in strided_parts(x):
            see(part)
        if not x.requires_grad:
            return x
        # Not itself: an operator's own output would keep its graph alive, and the graph the output.
        with DisableTorchFunctionSubclass():
            return x.detach()

    return saved_tensors_hooks(pack, lambda x: x)


def strided_parts(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a storage that `x` is made of: itself, or the indices and values of a sparse one."""
    if x.layout is torch.sparse_coo:
        return indices_and_values(x)
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return x.ccol_indices(), x.row_indices(), x.values()
    return (x,)


def _forget(seen: set[int], key: int, uncount: Callable[[], None]) -> None:
    seen.discard(key)
    uncount()


def storage_key(x: Tensor) -> int:
    """What tells the storage of `x` from others that are alive."""
    return address_of(x.untyped_storage())
