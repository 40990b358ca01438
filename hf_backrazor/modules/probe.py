"""A forward of one module that is looked at and thrown away: what it saves that no operator of razor takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import in_checkpoint
from ..saved_tensors import noting_saved


class _State(threading.local):
    """Of the code that runs in this thread."""

    def __init__(self) -> None:
        self.probes = 0
        self.operators = 0
        self.checkpointed = 0
        self.dense = 0


Hook = TypeVar("Hook", bound=Callable[..., Any])

_state = _State()
_NOTHING = nullcontext()


def is_dense() -> bool:
    """Whether razor's operators are to do what plain modules do, as all around them is computed again."""
    return _state.dense > 0


@contextmanager
def dense() -> Iterator[None]:
    """Inside this context, razor's operators do what plain modules do."""
    _state.dense += 1
    try:
        yield
    finally:
        _state.dense -= 1


def is_probing() -> bool:
    """Whether a forward runs that is looked at and thrown away."""
    return _state.probes > 0


def operator_running() -> AbstractContextManager:
    """A context for an operator of razor; what is saved inside of it is no loose tensor."""
    if not _state.probes:
        return _NOTHING
    if in_checkpoint() and not is_dense():
        _state.checkpointed += 1
    return _operator()


@contextmanager
def _operator() -> Iterator[None]:
    _state.operators += 1
    try:
        yield
    finally:
        _state.operators -= 1


def sees_probes(hook: Hook) -> Hook:
    """Mark a forward hook, or one that runs before a forward, that does no harm if it runs for a probe as well."""
    hook.razor_sees_probes = True  # type: ignore[attr-defined]
    return hook


def has_hooks_inside(module: nn.Module) -> bool:
    """Whether modules in `module` have forward hooks that may not run once more: one may collect outputs for a loss."""
    inside = (inner for inner in module.modules() if inner is not module)
    hooks = (hook for inner in inside for hook in (*inner._forward_hooks.values(), *inner._forward_pre_hooks.values()))
    return not all(getattr(hook, "razor_sees_probes", False) for hook in hooks)


class Probe:
    """What one forward of a module shows.

    Args:
        known: tensors that are not counted, as they are there anyway.
        inputs: what the module computes from.

    Attributes:
        loose_bytes: of the tensors that autograd saved for operators that razor has none for, without indices.
        packed_bytes: of those that razor's operators saved.
        branches: whether what the module does, or the shapes in it, depend on the values of what it computes.
        checkpoints: whether operators of razor run under an activation checkpointing of its own.

    Example:
        >>> probe = Probe(module.parameters(), [x])
        >>> with probe.watching():
        ...     result = module(x)
        >>> probe.loose_bytes
    """

    def __init__(self, known: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self.loose_bytes = self.packed_bytes = 0
        self.checkpoints = False
        self._known = list(known)
        self._branching = _Branching(inputs)

    @property
    def branches(self) -> bool:
        """See the class."""
        return self._branching.seen

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context the module is to run once; what it returns has to live until the context ends."""
        # An operator that this probe is inside of has nothing to do with it.
        operators, _state.operators = _state.operators, 0
        _state.probes += 1
        checkpointed = _state.checkpointed
        try:
            with self._branching, noting_saved(self._note, self._known):
                yield
            self.checkpoints = _state.checkpointed > checkpointed
        finally:
            _state.probes -= 1
            _state.operators = operators

    def _note(self, x: Tensor) -> Callable[[], None]:
        size = x.untyped_storage().nbytes()
        if _state.operators:
            self.packed_bytes += size
        elif x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            self.loose_bytes += size
            return lambda: self._forget(size)
        return lambda: None

    def _forget(self, size: int) -> None:
        self.loose_bytes -= size


# Their result, or its shape, is what values say.
_READS_VALUES: set[Callable[..., Any]] = {
    torch.nonzero, Tensor.nonzero, torch.argwhere, torch.masked_select, Tensor.masked_select, torch.unique,
    Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount, Tensor.bincount, Tensor.item,
    Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__contains__, torch.equal, Tensor.equal, torch.allclose,
}  # fmt: skip
_INDEXES: set[Callable[..., Any]] = {Tensor.__getitem__, Tensor.__setitem__}


class _Branching(TorchFunctionMode):
    """Sees whether values decide, that a gradient goes through or that are computed from such."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = False
        # Weakly, as what dies with its part of the graph is not saved in the end.
        self._computed: WeakTensorKeyDictionary = WeakTensorKeyDictionary(dict.fromkeys(inputs, True))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Else each attribute that is read here goes through the probes around this one, which read some themselves.
        with torch._C.DisableTorchFunction():
            self._look(func, args, kwargs or {}, result)
        return result

    def _look(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if not any(map(self._is_computed, _tensors(*args, *kwargs.values()))):
            return
        reads = func in _READS_VALUES or (func is torch.where and len(args) + len(kwargs) == 1)
        index = _tensors(args[1]) if func in _INDEXES else ()
        if reads or any(x.dtype == torch.bool and self._is_computed(x) for x in index):
            self.seen = True
        for x in _tensors(result):
            if x.grad_fn is None:
                self._computed[x] = True

    def _is_computed(self, x: Tensor) -> bool:
        # What autograd functions return is seen by its graph alone.
        return x.grad_fn is not None or x in self._computed


def _tensors(*values: Any) -> Iterator[Tensor]:
    """The tensors among these, and in collections among these."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))
