"""The mode that sees the functions of torch that a module's own code calls, and none that modules inside it call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compat import (
    current_function_mode,
    current_function_modes,
    leaves_functions_alone,
    without_current_function_mode,
)
from ..extension import Extension
from .probe import operator_running

_NOTHING = nullcontext()


class Call(NamedTuple):
    """What takes the place of a function of torch.

    Attributes:
        kind: of function.
        replacement: called with the module whose code calls, and the function's arguments. Where it returns
            NotImplemented, the function itself is called.
        common: whether all sorts of code calls the function, so that it counts where it is replaced alone.
        sees_inputs: whether the replacement also takes `inputs`, what the module was called with.
    """

    kind: str
    replacement: Callable[..., Any]
    common: bool = False
    sees_inputs: bool = False


class Calls:
    """What a module's own code was seen to call. Replicas of a model share it.

    Under the mode each function of torch takes 3 microseconds more. So it is on in every forward where something was
    seen, and in the forwards 1, 2, 4, 8, ... where nothing was yet: code may take another way later.

    Attributes:
        kinds: of functions, in the order that they were seen in.
        forwards: how many there were that count: in training, with gradients.
        seen_nothing: whether there was a forward, and nothing was seen.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, None] = {}
        self.forwards = 0
        self.seen_nothing = False

    def count(self) -> None:
        """Count a forward that was watched."""
        self.forwards += 1
        # Kept, as the compiler would compile again for every other number of forwards.
        self.seen_nothing = not self.kinds

    def rest(self) -> bool:
        """Whether the next forward goes without the mode; it is counted if so."""
        if self.kinds or not self.forwards & (self.forwards + 1):
            return False
        self.forwards += 1
        return True


class OwnCalls(TorchFunctionMode):
    """On while the own code of `module` runs.

    Args:
        module: a module with `razor_calls`.
        table: for a function, what may take its place, in order.
        inputs: what the module was called with.
        in_graph: where the compiler traces: called with the module, a function's place in the table and its arguments,
            in place of the function.
    """

    def __init__(
        self,
        module: Any,
        table: Mapping[Callable[..., Any], tuple[Call, ...]],
        inputs: Any,
        in_graph: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self._module, self._table, self._inputs, self._in_graph = module, table, inputs, in_graph
        self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._in_graph is not None:
            if func not in self._table:
                return func(*args, **kwargs)
            return self._in_graph(self._module, list(self._table).index(func), *args, **kwargs)
        calls = () if self._paused else self._table.get(func, ())
        if calls and all(map(_is_plain, types)):
            for kind, replacement, common, sees_inputs in calls:
                more = {"inputs": self._inputs} if sees_inputs else {}
                with operator_running():
                    result = replacement(self._module, *args, **kwargs, **more)
                if result is not NotImplemented or not common:
                    self._module.razor_calls.kinds[kind] = None
                if result is not NotImplemented:
                    return result
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this context it replaces nothing."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


class Apart(Extension):
    """A module that stays as it is, inside of one whose own calls are replaced: what it calls is none of these."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's."""
        with without_own_calls():
            return super().__call__(*args, **kwargs)


def without_own_calls() -> AbstractContextManager:
    """Switches the mode off for what is no code of the module's own, such as a module inside of it.

    There each function would cost 3 microseconds: a third of what razor's Python takes in a MobileNetV2.
    """
    top = current_function_mode()
    if top is None:
        return _NOTHING
    if isinstance(top, OwnCalls):
        return without_current_function_mode()
    # Somebody else's is on as well, such as that of `torch.device`.
    modes = [mode for mode in current_function_modes() if isinstance(mode, OwnCalls)]
    return modes[-1].paused() if modes else _NOTHING


def _is_plain(cls: type) -> bool:
    """Whether tensors of this class are plain ones to the functions of torch: not logits that are not there yet."""
    return cls in (Tensor, nn.Parameter) or leaves_functions_alone(cls)
