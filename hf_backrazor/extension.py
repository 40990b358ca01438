"""Extending the class of one object in place, as FSDP2 does with `FSDPModule`.

The object stays what it was: same identity, parameters, hooks and buffers, still an instance of its former class.
Other instances of that class do not notice.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import nn


class Extension:
    """Base of the classes that objects are extended by. `extend` puts them before the object's own class.

    Attributes:
        name_prefix: goes before the name of the extended class.
        plain_class: the class that the object had before it was extended.
        extensions: what it was extended by, the last one first.
    """

    name_prefix: ClassVar[str] = ""
    plain_class: type[nn.Module]
    extensions: tuple[type[Extension], ...]

    @classmethod
    def members(cls, plain_class: type[nn.Module]) -> dict[str, Any]:
        """What classes made of this extension and `plain_class` have besides."""
        return {}

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The combined class is made at run time, so pickle cannot find it by name; deepcopy comes through here too.
        return _rebuild, (self.extensions, self.plain_class), self.__dict__


@cache
def _extended_class(extensions: tuple[type[Extension], ...], plain_class: type[nn.Module]) -> type[nn.Module]:
    name = "".join(extension.name_prefix for extension in extensions) + plain_class.__name__
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


def extend(module: nn.Module, extension: type[Extension]) -> None:
    """Make `extension` the first base of `module`'s class."""
    if "extensions" in vars(type(module)):
        extensions, plain_class = module.extensions, module.plain_class
    else:
        extensions, plain_class = (), type(module)
    module.__class__ = _extended_class((extension, *extensions), plain_class)


def restore(module: nn.Module, *kinds: type[Extension]) -> None:
    """Undo `extend` for extensions of these kinds; others stay."""
    kept = tuple(extension for extension in module.extensions if not issubclass(extension, kinds))
    plain_class = module.plain_class
    module.__class__ = plain_class
    for extension in reversed(kept):
        extend(module, extension)


def _rebuild(extensions: tuple[type[Extension], ...], plain_class: type[nn.Module]) -> nn.Module:
    cls = _extended_class(extensions, plain_class)
    return cls.__new__(cls)
