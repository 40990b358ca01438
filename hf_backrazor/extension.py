"""Extending the class of one object in place, as FSDP2 does with `FSDPModule`.

The object stays what it was: same identity, parameters, hooks and buffers, still an instance of its former class.
Other instances of that class do not notice.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


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
    """Make `extension` the first base of `module`'s class.

    Of a parametrized module (`torch.nn.utils.parametrize`), that is the class which it had before: torch's own stays on
    top, as it is taken off again by its first base.
    """
    top = type(module)
    base = top.__bases__[0] if is_parametrized(module) and top.__name__.startswith("Parametrized") else top
    extensions, plain_class = (base.extensions, base.plain_class) if "extensions" in vars(base) else ((), base)
    module.__class__ = _rebased(top, base, _extended_class((extension, *extensions), plain_class))


def restore(module: nn.Module, *kinds: type[Extension]) -> None:
    """Undo `extend` for extensions of these kinds; others stay, and so does what torch put on top meanwhile."""
    for base in type(module).__mro__:
        if "extensions" in vars(base) and any(issubclass(extension, kinds) for extension in base.extensions):
            kept = tuple(extension for extension in base.extensions if not issubclass(extension, kinds))
            below = _extended_class(kept, base.plain_class) if kept else base.plain_class
            module.__class__ = _rebased(type(module), base, below)
            restore(module, *kinds)
            return


def _rebased(cls: type, old: type, new: type) -> type:
    """`cls`, which derives from `old`, deriving from `new` instead."""
    if cls is old:
        return new
    bases = tuple(_rebased(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    members = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)


def _rebuild(extensions: tuple[type[Extension], ...], plain_class: type[nn.Module]) -> nn.Module:
    cls = _extended_class(extensions, plain_class)
    return cls.__new__(cls)
