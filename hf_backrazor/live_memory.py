"""How much memory the tensors that are alive take, at any time and at most."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators make inside this context, for as long as they live. Fake ones, too.

    Args:
        known: tensors that were there before, and are not counted.

    Attributes:
        live: bytes alive now.
        peak: the greatest that `live` was.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See `TorchDispatchMode`."""
        # What an operator is given, and none here has made, was there before: a constant that it returns a view of.
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._count(x, 0)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x, x.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, x: Tensor, nbytes: int) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._counted:
            self._counted.add(key)
            self.live += nbytes
            weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        # Another storage may come to lie at the same address.
        self._counted.discard(key)
        self.live -= nbytes
