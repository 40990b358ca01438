"""Tensors that know how they are computed, and are not computed yet.

What is asked of shape, dtype or device is answered at once. What a handler knows is done without the elements. Anything
else makes the tensor compute itself, once, as the plain code would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyTensor(Tensor):
    """Base of tensors that stand for others.

    Attributes:
        handlers: name of a function of torch -> what takes its place, while the elements are not there; called with
            the function's arguments. `NotImplemented` makes the tensor compute itself.
    """

    handlers: ClassVar[dict[str, Callable[..., Any]]] = {}
    _dense: Tensor | None

    @classmethod
    def standing_for(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """A new tensor without elements, for subclasses to complete."""
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device, requires_grad=True)
        self._dense = None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def _compute(self, asked_by: str) -> Tensor:
        """The dense tensor, part of the graph; `asked_by` names the function that needs it."""
        raise NotImplementedError

    def compute(self, asked_by: str) -> Tensor:
        """The dense tensor, computed once, and part of the graph."""
        if self._dense is None:
            self._dense = self._compute(asked_by)
        return self._dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name == "__get__" and getattr(func.__self__, "__name__", "") in _METADATA) or name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = cls.handlers.get(name)
        # Once they are computed they may have been written to.
        if handler is not None and isinstance(args[0], LazyTensor) and args[0]._dense is None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result

        def dense(x: Any) -> Any:
            return x.compute(name) if isinstance(x, LazyTensor) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        # Reached only from C++, where no function above intercepts.
        def dense(x: Any) -> Any:
            return x.compute(str(func)).detach() if isinstance(x, LazyTensor) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def widened_dtype(x: LazyTensor, *args: Any, **kwargs: Any) -> torch.dtype | None:
    """The dtype that `x.to(...)` with these arguments has; None if that is more than a cast that changes no value."""
    if any(isinstance(argument, Tensor) for argument in args) or kwargs.get("copy"):
        return None
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if memory_format is not None or (device is not None and device != x.device):
        return None
    if dtype is None or dtype == x.dtype:
        return x.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > x.dtype.itemsize else None


_METADATA = frozenset(
    (
        *("shape", "dtype", "device", "layout", "ndim", "names", "requires_grad", "is_leaf", "grad_fn", "_base"),
        *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested"),
        *("size", "dim", "numel", "nelement", "__len__", "get_device"),
        *("is_floating_point", "is_complex", "is_contiguous"),
    )
)
