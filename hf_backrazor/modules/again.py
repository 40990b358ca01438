"""What it takes to run a module a second time: arguments by their names, no caches, buffers as before."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.utils import logging

from ..compat import ACCELERATE_HOOK, is_fake, takes_cache_when_checkpointed
from ..functional.rng import HostRandomState

logger = logging.get_logger(__name__)

# Caches of keys, values and states, by the names that modules give them. A second run would add to them again.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward that may be given by position, but for `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, each in inspect.signature(forward).parameters.items() if each.kind in kinds)[1:]


def without_caches(
    module: nn.Module, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], warns: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments, with None for caches; None if a cache holds something already.

    Args:
        module: whose arguments they are.
        names: of those that may be given by position.
        args: those given by position.
        kwargs: those given by name.
        warns: whether to tell that caches are not filled.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    caches = {name for name, value in given.items() if value is not None and (name in _CACHES or is_cache(value))}
    if not caches or takes_cache_when_checkpointed(module):
        return args, kwargs
    if any(_is_filled(module, given[name]) for name in caches):
        logger.warning_once(
            "razor: a cache that holds keys and values already is given in training, as by prefix tuning; the "
            "blocks that read it are saved dense"
        )
        return None
    if warns:
        logger.warning_once(
            "razor: blocks that are computed again in backward do not fill a cache; set `use_cache=False`"
        )
    # Those given by position have names as well.
    kwargs = {**{name: given[name] for name in names[1 : len(args)]}, **kwargs} | dict.fromkeys(caches)
    return args[:1], kwargs | ({"use_cache": False} if kwargs.get("use_cache") else {})


def is_cache(value: Any) -> bool:
    """Whether `value` is a cache of keys and values."""
    return isinstance(value, (Cache, EncoderDecoderCache))


def _is_filled(module: nn.Module, held: Any) -> bool:
    if not hasattr(held, "get_seq_length"):
        return False
    layer = next((m.layer_idx for m in module.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    return int(held.get_seq_length(layer)) > 0


class Changes(NamedTuple):
    """What a module's forward changes.

    Attributes:
        buffers: names of buffers.
        attributes: names of modules, each with the name of an attribute.
        draws: whether random numbers of Python or NumPy are drawn. Those of torch are looked after by checkpointing.
    """

    buffers: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    draws: bool


class State:
    """What a module's forward reads beside its arguments: parameters, buffers, attributes such as a recurrent state,
    with what is in them if they are lists and the like, random numbers of Python and NumPy, and whether it is in
    training. Of what the forward itself changes there are copies.

    Args:
        module: whose state it is, as it is now.
        changes: what of it counts; None: all.
    """

    def __init__(self, module: nn.Module, changes: Changes | None = None) -> None:
        self._module = module
        self._modes = [(inner, inner.training) for inner in module.modules()]
        # `torch.func.functional_call` may have put others in their place. Accelerate's hooks bring offloaded ones, and
        # take them away.
        inside = [inner for inner in module.modules() if ACCELERATE_HOOK not in inner.__dict__]
        held: list[dict[str, Any]] = [each for inner in inside for each in (inner._parameters, inner._buffers)]
        self._tensors = [(tensors, dict(tensors)) for tensors in held if tensors]
        if changes is None:
            buffers = (name for name, _ in module.named_buffers())
            names = ((path, name) for path, inner in module.named_modules() for name in _attributes(inner))
            changes = Changes(tuple(buffers), tuple(names), draws=True)
        self._numbers = HostRandomState() if changes.draws else None
        # By their values: batch norms change their statistics without a new version.
        self._buffers = {name: module.get_buffer(name).clone() for name in changes.buffers}
        held_by = ((each, module.get_submodule(each[0]).__dict__) for each in changes.attributes)
        self._attributes = {each: owned.get(each[1], _ABSENT) for each, owned in held_by}
        self._contents = {each: _contents(value) for each, value in self._attributes.items()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside this context the module has this state; afterwards, the one that it has now."""
        tensors = [_swap_tensors(*each) for each in self._tensors]
        present = {name: self._swap_buffer(name, value.clone()) for name, value in self._buffers.items()}
        attributes = {each: self._swap_attribute(each, value) for each, value in self._attributes.items()}
        contents = [_swap_content(*each) for each in self._all_contents()]
        modes = [(inner, inner.training) for inner, _ in self._modes]
        numbers = None if self._numbers is None else HostRandomState()
        try:
            if self._numbers is not None:
                self._numbers.restore()
            for inner, training in self._modes:
                inner.training = training
            yield
        finally:
            if numbers is not None:
                numbers.restore()
            for inner, training in modes:
                inner.training = training
            for name, value in present.items():
                self._swap_buffer(name, value)
            for owned, held in tensors:
                owned.update(held)
            for container, content in contents:
                _swap_content(container, content)
            for each, value in attributes.items():
                self._swap_attribute(each, value)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` in this state."""
        with self.restored():
            return function(*args, **kwargs)

    def keep(self, changes: Changes) -> None:
        """Forget all but these."""
        self._buffers = {name: self._buffers[name] for name in changes.buffers}
        self._attributes = {each: self._attributes.get(each, _ABSENT) for each in changes.attributes}
        self._contents = {each: self._contents.get(each, []) for each in changes.attributes}
        self._numbers = self._numbers if changes.draws else None

    def changed(self) -> Changes:
        """What is other now."""
        now = State(self._module)
        real = {name: x for name, x in self._buffers.items() if not (x.is_meta or is_fake(x))}
        buffers = (name for name, x in real.items() if not torch.equal(now._buffers[name], x))
        held = {**dict.fromkeys(self._attributes, _ABSENT), **now._attributes}
        others = {each for each, x in held.items() if x is not self._attributes.get(each, _ABSENT)}
        others |= {each for each, pairs in self._contents.items() if not all(_holds(*pair) for pair in pairs)}
        draws = self._numbers is not None and not self._numbers.is_present()
        return Changes(tuple(buffers), tuple(each for each in held if each in others), draws)

    def _all_contents(self) -> list[tuple[Any, Any]]:
        """Containers and what they hold, each once: several attributes may be one object."""
        return list({id(pair[0]): pair for pairs in self._contents.values() for pair in pairs}.values())

    def _swap_buffer(self, name: str, value: Tensor | None) -> Tensor | None:
        path, _, last = name.rpartition(".")
        owner = self._module.get_submodule(path)
        before, owner._buffers[last] = owner._buffers[last], value
        return before

    def _swap_attribute(self, each: tuple[str, str], value: Any) -> Any:
        owned = self._module.get_submodule(each[0]).__dict__
        before = owned.pop(each[1], _ABSENT)
        if value is not _ABSENT:
            owned[each[1]] = value
        return before


_ABSENT = object()


def _swap_tensors(owned: dict[str, Any], held: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put tensors in the place of others; returns where, with those that were there."""
    before = {name: owned[name] for name, x in held.items() if name in owned and owned[name] is not x}
    owned.update({name: held[name] for name in before})
    return owned, before


# Those of other types may not let others write into them, as the outputs of Transformers.
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict)


def _contents(value: Any) -> list[tuple[Any, Any]]:
    """The containers that are `value` or in it, each with a copy that tells what it holds now."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if type(each) in _CONTAINERS and id(each) not in found:
            found[id(each)] = each, copy.copy(each)
            waiting += _items(each)
        elif type(each) is tuple:
            waiting += each
    return list(found.values())


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _holds(container: Any, content: Any) -> bool:
    """Whether the container holds the objects that `content`, one of its type, does."""
    if isinstance(container, set):
        return container == content  # a copy need not be in the same order
    return list(map(id, _items(container))) == list(map(id, _items(content)))


def _swap_content(container: Any, content: Any) -> tuple[Any, Any]:
    """Put the objects in `content` into the container; returns it, with what it held."""
    before = copy.copy(container)
    if not _holds(container, content):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)
    return container, before


def _attributes(module: nn.Module) -> list[str]:
    """Names of what a forward may have put on the object."""
    torchs = nn.Module().__dict__
    return [name for name in module.__dict__ if name not in torchs and not name.startswith("razor_")]


def is_mask(name: str, value: Any) -> bool:
    """Whether this argument is an attention mask that is worth packing."""
    # Those of two dimensions are small, and model code reads them in other ways.
    return name.endswith("mask") and isinstance(value, Tensor) and value.dim() > 2


def row_dims(module: nn.Module, x: Tensor) -> int:
    """Dimensions of a row of the module's input `x`: those of a map, where it is one for convolutions; 1 otherwise."""
    spatial = x.dim() - 2
    if not 2 <= spatial <= 3:
        return 1
    kind = (nn.Conv2d, nn.Conv3d)[spatial - 2]
    return spatial if any(isinstance(inner, kind) for inner in module.modules()) else 1
