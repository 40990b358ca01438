"""Which modules a configuration means, by their dotted names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import regex

# A pattern may come from a file on the Hub, and some take time that is exponential in the length of a name.
MATCH_SECONDS = 1.0


class Targets(Protocol):
    """The part of a configuration that names modules; `RazorConfig` documents the fields."""

    @property
    def target_modules(self) -> list[str] | str | None: ...
    @property
    def exclude_modules(self) -> list[str] | str | None: ...
    @property
    def layers_to_transform(self) -> list[int] | int | None: ...
    @property
    def recompute_modules(self) -> list[str] | str | None: ...
    @property
    def overrides(self) -> Mapping[str, Mapping[str, Any]]: ...


def matches_target(config: Targets, name: str) -> bool:
    """Whether the module called `name` is targeted: listed, not excluded, and in one of the layers asked for.

    A module without a layer index in its name is in no layer, so it does not match if `layers_to_transform`
    is set.
    """
    if config.target_modules is not None and not _is_listed(config.target_modules, name):
        return False
    return not is_excluded(config, name)


def is_excluded(config: Targets, name: str) -> bool:
    """Whether the module called `name` is excluded, or in none of the layers asked for."""
    if config.exclude_modules is not None and _is_listed(config.exclude_modules, name):
        return True
    return config.layers_to_transform is not None and layer_index(name) not in _layers(config)


def matches_block(config: Targets, name: str, *classes: str) -> bool:
    """Whether the module called `name`, of classes of these names, is named as a block that is computed again.

    Without `recompute_modules`, those of Transformers' `GradientCheckpointingLayer` are.
    """
    modules = config.recompute_modules
    if modules is None:
        return "GradientCheckpointingLayer" in classes
    return any(_is_listed(modules, each) for each in (name, *classes))


def unmatched_blocks(config: Targets, names: Iterable[str]) -> list[str]:
    """What in `recompute_modules` matches none of `names`, of modules and of their classes; in words."""
    return _unmatched(_entries("recompute_modules", config.recompute_modules), names)


def unmatched_targets(config: Targets, names: Iterable[str]) -> list[str]:
    """What in `config` matches none of `names`, each in words, such as "target_modules entry 'querry'".

    Looks at the entries of `target_modules`, the patterns of `overrides` and the indices in
    `layers_to_transform`, each by itself. Not at `exclude_modules`: to exclude what a model does not have is
    no mistake.
    """
    names = list(names)
    entries = _entries("target_modules", config.target_modules)
    entries += [("overrides pattern", pattern, match_pattern) for pattern in config.overrides]
    present = {layer_index(name) for name in names}
    return _unmatched(entries, names) + [f"layers_to_transform index {i}" for i in _layers(config) if i not in present]


def match_pattern(pattern: str, name: str) -> bool:
    """Whether the regex `pattern` matches all of `name`, or all that follows one of its dots."""
    # As PEFT reads rank_pattern, but not put into a longer pattern: "(?i)" is legal only at the start of one.
    parts = name.split(".")
    return any(_fullmatch(pattern, ".".join(parts[i:])) for i in range(len(parts)))


def layer_index(name: str) -> int | None:
    """The first component of the dotted `name` that is an integer; None if there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


# What names modules: its kind in words, itself, and whether it matches a name.
_Entry = tuple[str, str, Callable[[str, str], bool]]


def _entries(field: str, modules: list[str] | str | None) -> list[_Entry]:
    if isinstance(modules, str):
        return [(f"{field} regex", modules, _fullmatch)]
    return [(f"{field} entry", entry, _is_entry) for entry in modules or []]


def _unmatched(entries: Iterable[_Entry], names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"{kind} {entry!r}" for kind, entry, matches in entries if not any(matches(entry, name) for name in names)]


def _is_listed(modules: list[str] | str, name: str) -> bool:
    if isinstance(modules, str):
        return _fullmatch(modules, name)
    return any(_is_entry(entry, name) for entry in modules)


def _fullmatch(pattern: str, name: str) -> bool:
    # `regex` in place of `re`: it reads the same patterns, and can stop.
    try:
        return regex.fullmatch(pattern, name, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"the pattern {pattern!r} takes more than {MATCH_SECONDS:g} s to compare with the module name {name!r}: "
            "write it without repetitions inside of repetitions"
        ) from None


def _is_entry(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _layers(config: Targets) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers or []
