"""Extending the class of one object in place, as FSDP2 does with `FSDPModule`.

The object stays what it was: same identity, parameters, hooks and buffers, still an instance of its former class.
Other instances of that class do not notice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, TypeVar, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .compat import ACCELERATE_FORWARD

if TYPE_CHECKING:

    class _Module(nn.Module):
        """A module of any class, with attributes of any type."""

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
else:
    _Module = object

_Function = TypeVar("_Function", bound=Callable[..., Any])


def class_cache(function: _Function) -> _Function:
    """`functools.cache` for functions of classes, which type checkers do not take for hashable."""
    return cast(_Function, cache(function))


class Extension(_Module):
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
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """What classes have besides that are made of this extension and `extended`: a plain or an extended class."""
        return {}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The combined class is made at run time, so pickle cannot find it by name; deepcopy comes through here too.
        return _rebuild, (self.extensions, self.plain_class), self.__dict__


@class_cache
def _extended_class(extensions: tuple[type[Extension], ...], plain_class: type[nn.Module]) -> type[nn.Module]:
    first, *others = extensions
    extended = _extended_class(tuple(others), plain_class) if others else plain_class
    namespace = {
        "__init__": _initializer(extended),
        **first.members(extended),
        "plain_class": plain_class,
        "extensions": extensions,
        "__module__": plain_class.__module__,
        "__doc__": plain_class.__doc__,
    }
    return type(first.name_prefix + extended.__name__, (first, extended), namespace)


def _initializer(extended: type[nn.Module]) -> Callable[..., None]:
    """The `__init__` of a class that extends this one: objects are extended by `extend` alone.

    Code that makes one more of a layer's class, as PEFT does for the adapters of a convolution, gets a plain one.
    """

    @wraps(extended.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        extended.__init__(self, *args, **kwargs)
        if "extensions" in vars(type(self)):
            self.__class__ = type(self).plain_class

    return __init__


def extend(module: nn.Module, extension: type[Extension]) -> None:
    """Make `extension` the first base of `module`'s class.

    Of a parametrized module (`torch.nn.utils.parametrize`), that is the class which it had before: torch's own stays on
    top, as it is taken off again by its first base.
    """
    top = type(module)
    base: Any = top.__bases__[0] if is_parametrized(module) and top.__name__.startswith("Parametrized") else top
    extensions, plain_class = (base.extensions, base.plain_class) if "extensions" in vars(base) else ((), base)
    _become(module, _rebased(top, base, _extended_class((extension, *extensions), plain_class)))


def can_extend(module: nn.Module, extension: type[Extension]) -> bool:
    """Whether Python lets the object have such a class.

    It does not where a class with slots comes first among the bases, as `abc.ABC` and `typing.Generic` are:
    `class Layer(ABC, nn.Module)`.
    """
    if "extensions" in vars(type(module)) or is_parametrized(module):
        return True  # its layout is that of a class that was extended, or made, at run time
    blank = object.__new__(type(module))
    try:
        blank.__class__ = _extended_class((extension,), type(module))
    except TypeError:
        return False
    return True


def restore(module: nn.Module, *kinds: type[Extension]) -> None:
    """Undo `extend` for extensions of these kinds; others stay, and so does what torch put on top meanwhile."""
    base: Any
    for base in type(module).__mro__:
        if "extensions" in vars(base) and any(issubclass(extension, kinds) for extension in base.extensions):
            kept = tuple(extension for extension in base.extensions if not issubclass(extension, kinds))
            below = _extended_class(kept, base.plain_class) if kept else base.plain_class
            _become(module, _rebased(type(module), base, below))
            restore(module, *kinds)
            return


def runs_its_class(module: nn.Module) -> bool:
    """Whether the forward of the object's class is what runs in the end.

    It is, unless another was set on the object: if that is a hook of Accelerate (`device_map`, offloading), it runs the
    one that it found there.
    """
    own = module.__dict__
    return "forward" not in own or any(_is_bound(own.get(name), module) for name in _BOUND)


# Where Accelerate leaves a module's forward: when it puts a hook on, and when it takes one off.
_BOUND = (ACCELERATE_FORWARD, "forward")


def _is_bound(method: Any, module: nn.Module) -> bool:
    """Whether `method` is the forward of the object's class."""
    is_own = isinstance(method, MethodType) and method.__self__ is module
    return is_own and method.__func__ is getattr(type(module), "forward", None)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give the object another class. Where its forward is bound, it is that of the new class from now on."""
    bound = [name for name in _BOUND if _is_bound(module.__dict__.get(name), module)]
    module.__class__ = cls
    for name in bound:
        module.__dict__[name] = MethodType(cls.forward, module)


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
