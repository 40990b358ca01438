"""Extending the class of one object in place, as FSDP2 does with `FSDPModule`.

The object stays what it was: same identity, parameters, hooks and buffers, still an instance of its former class.
Other instances of that class do not notice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Extension:
    """Base of the classes that objects are extended by. `extend` puts them before the object's own class."""

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The combined class is made at run time, so pickle cannot find it by name; deepcopy comes through here too.
        return _rebuild, (type(self).__mro__[1], self.plain_class, _name_prefix(self)), self.__dict__


@cache
def _extended_class(extension: type[Extension], plain_class: type[nn.Module], prefix: str) -> type[nn.Module]:
    name = prefix + plain_class.__name__
    namespace = {"plain_class": plain_class, "__module__": plain_class.__module__, "__doc__": plain_class.__doc__}
    return type(name, (extension, plain_class), namespace)


def extend(module: nn.Module, extension: type[Extension], prefix: str = "") -> None:
    """Make `extension` the first base of `module`'s class; the class's name gets `prefix`."""
    module.__class__ = _extended_class(extension, type(module), prefix)


def restore(module: nn.Module) -> None:
    """Undo `extend`."""
    module.__class__ = module.plain_class


def _name_prefix(module: Extension) -> str:
    return type(module).__name__.removesuffix(module.plain_class.__name__)


def _rebuild(extension: type[Extension], plain_class: type[nn.Module], prefix: str) -> nn.Module:
    cls = _extended_class(extension, plain_class, prefix)
    return cls.__new__(cls)
