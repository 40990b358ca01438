"""A forward of one module that is looked at and thrown away: what it saves that no operator of razor takes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import DisableTorchFunction, forward_hooks, in_checkpoint, tree_leaves
from ..saved_tensors import seeing_saved, storage_key, strided_parts


class _State(threading.local):
    """Of the code that runs in this thread."""

    def __init__(self) -> None:
        self.probes: list[Probe] = []
        self.saved = 0
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
    return bool(_state.probes)


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
    hooks = (hook for inner in inside for hook in forward_hooks(inner))
    return not all(getattr(hook, "razor_sees_probes", False) for hook in hooks)


class Probe:
    """What one forward of a module shows. Probes of modules inside of it may look at the same run.

    Args:
        known: tensors that are not counted, as they are there anyway. They have to live as long as the probe watches.
        inputs: what the module computes from.

    Attributes:
        branches: whether what the module does, or the shapes in it, depend on the values of what it computes.
        checkpoints: whether operators of razor run under an activation checkpointing of its own.

    Example:
        >>> probe = Probe(module.parameters(), [x])
        >>> with probe.watching():
        ...     result = module(x)
        >>> probe.loose_bytes
    """

    def __init__(self, known: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self.branches = self.checkpoints = False
        self._known = {storage_key(part) for x in known for part in strided_parts(x)}
        # Weakly, as what dies with its part of the graph is not saved in the end.
        self._computed: WeakTensorKeyDictionary = WeakTensorKeyDictionary(dict.fromkeys(inputs, True))
        self._saved: dict[int, _Saved] = {}
        self._instead = 0

    @property
    def loose_bytes(self) -> int:
        """Of the tensors that autograd saved for operators that razor has none for, without indices."""
        return sum(each.nbytes for each in self._saved.values() if each.loose)

    @property
    def packed_bytes(self) -> int:
        """Of those that razor's operators saved."""
        return sum(each.nbytes for each in self._saved.values() if not each.loose) + self._instead

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context the module is to run once; what it returns has to live until the context ends."""
        # An operator that this probe is inside of has nothing to do with it.
        self._operators, self._start = _state.operators, _state.saved
        checkpointed = _state.checkpointed
        _state.probes.append(self)
        try:
            with _looking() if len(_state.probes) == 1 else _NOTHING:
                yield
            self.checkpoints = _state.checkpointed > checkpointed
        finally:
            _state.probes.pop()

    def replace(self, nbytes: int) -> None:
        """Tell the probes around this one that the module will store so many bytes instead of what was seen."""
        for outer in _state.probes:
            for key in [key for key, each in outer._saved.items() if each.number > self._start]:
                del outer._saved[key]
            outer._instead += nbytes

    def _see(self, key: int, nbytes: int, floating: bool) -> None:
        packed = _state.operators > self._operators
        if key not in self._known and key not in self._saved and (packed or floating):
            self._saved[key] = _Saved(nbytes, not packed, _state.saved)

    def _look(self, values: list[Tensor], index: list[Tensor], reads: bool, results: list[Tensor]) -> None:
        if not any(map(self._is_computed, values)):
            return
        if reads or any(map(self._is_computed, index)):
            self.branches = True
        for x in results:
            self._computed[x] = True

    def _is_computed(self, x: Tensor) -> bool:
        # What autograd functions return is seen by its graph alone.
        return x.grad_fn is not None or x in self._computed


class _Saved(NamedTuple):
    """A storage that autograd saved in a forward.

    Attributes:
        nbytes: its size.
        loose: whether no operator of razor saved it.
        number: of those in this thread, when it was saved.
    """

    nbytes: int
    loose: bool
    number: int


@contextmanager
def _looking() -> Iterator[None]:
    """Inside this context the probes of this thread see what is saved and which functions of torch are called."""
    watched: list[weakref.finalize] = []

    def see(part: Tensor) -> None:
        storage, key = part.untyped_storage(), storage_key(part)
        _state.saved += 1
        floating = part.is_floating_point() or part.is_complex() or part.dtype == torch.bool
        for probe in _state.probes:
            probe._see(key, storage.nbytes(), floating)
        watched.append(weakref.finalize(storage, _forget, [probe._saved for probe in _state.probes], key))

    try:
        with _Calls(), seeing_saved(see):
            yield
    finally:
        for each in watched:
            each.detach()


def _forget(counts: list[dict[int, _Saved]], key: int) -> None:
    """Storages that die with their part of the graph leave nothing. DoRA drops some of what its forward saves."""
    for saved in counts:
        saved.pop(key, None)


# Their result, or its shape, is what values say.
_READS_VALUES: set[Callable[..., Any]] = {
    torch.nonzero, Tensor.nonzero, torch.argwhere, torch.masked_select, Tensor.masked_select, torch.unique,
    Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount, Tensor.bincount, Tensor.item,
    Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__contains__, torch.equal, Tensor.equal, torch.allclose,
}  # fmt: skip
_INDEXES: set[Callable[..., Any]] = {Tensor.__getitem__, Tensor.__setitem__}


class _Calls(TorchFunctionMode):
    """Shows the probes of this thread which values decide: those that a gradient goes through, and all from these."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Else attributes that are read here would come here again.
        with DisableTorchFunction():
            reads = func in _READS_VALUES or (func is torch.where and len(args) + len(kwargs) == 1)
            index = [x for x in _tensors(args[1]) if x.dtype == torch.bool] if func in _INDEXES else []
            results = [x for x in _tensors(result) if x.grad_fn is None]
            if reads or index or results:
                values = list(_tensors(*args, *kwargs.values()))
                for probe in _state.probes:
                    probe._look(values, index, reads, results)
        return result


def _tensors(*values: Any) -> Iterator[Tensor]:
    """The tensors among these, and in collections among these."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))
