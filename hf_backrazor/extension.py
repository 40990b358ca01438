"""Extending the class of one object in place, as FSDP2 does with `FSDPModule`.

The object stays what it was: same identity, parameters, hooks and buffers, still an instance of its former class.
Other instances of that class do not notice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Extension:
    """Base of the classes that objects are extended by. `extend` puts them before the object's own class.

    Attributes:
        plain_class: the class that the object had before it was extended.
        extensions: what it was extended by, the last one first.
    """

    plain_class: type[nn.Module]
    extensions: tuple[type[Extension], ...]

    @classmethod
    def members(cls, plain_class: type[nn.Module]) -> dict[str, Any]:
        """What classes made of this extension and `plain_class` have besides."""
        return {}

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The combined class is made at run time, so pickle cannot find it by name; deepcopy comes through here too.
        return _rebuild, (self.extensions, self.plain_class, _name_prefix(self)), self.__dict__


@cache
def _extended_class(
    extensions: tuple[type[Extension], ...], plain_class: type[nn.Module], prefix: str
) -> type[nn.Module]:
    name = prefix + plain_class.__name__
    namespace: dict[str, Any] = {}
    for extension in reversed(extensions):
        namespace |= extension.members(plain_class)
    namespace |= {
        "plain_class": plain_class,
        "extensions": extensions,
        "__module__": plain_class.__module__,
        "__doc__": plain_class.__doc__,
    }
    return type(name, (*extensions, plain_class), namespace)


def extend(module: nn.Module, extension: type[Extension], prefix: str = "") -> None:
    """Make `extension` the first base of `module`'s class; the class's name gets `prefix`."""
    if "extensions" in vars(type(module)):
        extensions, plain_class, prefix = module.extensions, module.plain_class, prefix + _name_prefix(module)
    else:
        extensions, plain_class = (), type(module)
    module.__class__ = _extended_class((extension, *extensions), plain_class, prefix)


def restore(module: nn.Module) -> None:
    """Undo `extend`, as often as it was called."""
    module.__class__ = module.plain_class


def _name_prefix(module: Extension) -> str:
    return type(module).__name__.removesuffix(module.plain_class.__name__)


def _rebuild(extensions: tuple[type[Extension], ...], plain_class: type[nn.Module], prefix: str) -> nn.Module:
    cls = _extended_class(extensions, plain_class, prefix)
    return cls.__new__(cls)
