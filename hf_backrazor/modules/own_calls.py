"""The mode that sees the functions of torch that a module's own code calls, and none that modules inside it call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..compat import current_function_mode, traceable, without_current_function_mode
from .probe import operator_running

_NOTHING = nullcontext()


class OwnCalls(TorchFunctionMode):
    """On while the code of `module` runs: `calls` says for a function what takes its place."""

    def __init__(self, module: nn.Module, calls: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._module, self._calls = module, calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        call = self._calls.get(func)
        if call is not None and torch.compiler.is_dynamo_compiling():
            return _in_graph(self._module, list(self._calls).index(func), *args, **kwargs)
        if call is not None and _runs_now(self._module):
            with operator_running():
                result = call(self._module, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


@traceable
def _in_graph(module: nn.Module, place: int, *args: Any, **kwargs: Any) -> Any:
    """What the function at a place in the table gives, or what takes its place."""
    from .calls import CALLS

    function, call = list(CALLS.items())[place]
    result = call(module, *args, **kwargs)
    return function(*args, **kwargs) if result is NotImplemented else result


def without_own_calls() -> AbstractContextManager:
    """Switches the mode off for a module inside of the one that runs.

    It would take none of the calls there, but see each, and cost 3 microseconds a call: a third of what razor's Python
    takes in a MobileNetV2.
    """
    return without_current_function_mode() if isinstance(current_function_mode(), OwnCalls) else _NOTHING


def _runs_now(module: nn.Module) -> bool:
    """Whether `module` is the innermost one whose code is running, itself or in a function that it called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner is module
        frame = frame.f_back
    return False
