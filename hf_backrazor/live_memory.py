"""How much memory the tensors that are alive take, at any time and at most."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from .compat import TorchDispatchMode, address_of
from .modules.probe import is_probing
from .saved_tensors import storage_key, strided_parts


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators make inside this context, for as long as they live. Fake ones, too.

    Args:
        known: tensors that were there before, and are not counted.

    Attributes:
        live: bytes alive now.
        peak: the greatest that `live` was, but while a module's first forward is looked at (see `modules.probe`): that
            happens once in a training, not in each step.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted = {storage_key(part) for x in known for part in strided_parts(x)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        # A fake tensor is asked for its device as by an operator, which is more than half of all that come here.
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        # What an operator is given, and none here has made, was there before: a constant that it returns a view of.
        for x in _tensors((args, kwargs)):
            storage = x.untyped_storage()
            if address_of(storage) not in self._counted:
                self._count(storage, 0)
        result = func(*args, **kwargs)
        for x in _tensors(result):
            storage = x.untyped_storage()
            if address_of(storage) not in self._counted:
                self._count(storage, storage.nbytes())
        if not is_probing():
            self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: UntypedStorage, nbytes: int) -> None:
        self._counted.add(address_of(storage))
        self.live += nbytes
        weakref.finalize(storage, self._drop, address_of(storage), nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        # Another storage may come to lie at the same address.
        self._counted.discard(key)
        self.live -= nbytes


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors among what an operator takes or returns; of sparse ones their parts.

    `tree_leaves` takes twice as long, as it knows more.
    """
    if isinstance(x, Tensor):
        yield from strided_parts(x)
    elif isinstance(x, list | tuple):
        for each in x:
            yield from _tensors(each)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
