"""What it takes to run a module a second time: arguments by their names, no caches, buffers as before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Caches of keys, values and states, by the names that modules give them. A second run would add to them again.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@cache
def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of the class's forward that may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, each in inspect.signature(cls.forward).parameters.items() if each.kind in kinds)[1:]


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
    caches = {name: given[name] for name in _CACHES if given.get(name) is not None}
    if not caches or getattr(module, "_can_checkpoint_with_cache", False):
        return args, kwargs
    if any(_is_filled(module, held) for held in caches.values()):
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


def _is_filled(module: nn.Module, held: Any) -> bool:
    if not hasattr(held, "get_seq_length"):
        return False
    layer = next((m.layer_idx for m in module.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    return int(held.get_seq_length(layer)) > 0


def with_buffers(
    module: nn.Module, buffers: Mapping[str, Tensor], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`function(*args, **kwargs)`, with copies of these buffers in place of those of `module`.

    So that it does what it did when they were like this, and the running statistics of batch norms move once a step.
    """
    present: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name, value in buffers.items():
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            present.append((owner, last, owner._buffers[last]))
            owner._buffers[last] = value.clone()
        return function(*args, **kwargs)
    finally:
        for owner, last, value in present:
            owner._buffers[last] = value


def is_mask(name: str, value: Any) -> bool:
    """Whether this argument is an attention mask that is worth packing."""
    # Those of two dimensions are small, and model code reads them in other ways.
    return name.endswith("mask") and isinstance(value, Tensor) and value.dim() > 2
