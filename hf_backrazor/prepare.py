"""Which modules of a model get which operator, and their installing: all of them or none."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from .config import RazorConfig
from .extension import can_extend, extend, restore, runs_its_class
from .modules import (
    OPERATORS,
    Apart,
    RazorAttention,
    RazorBlock,
    RazorInline,
    RazorLMHead,
    RazorModule,
    RazorOutermost,
    RazorQuantizedLinear,
    RazorRecomputed,
    stack_blocks,
)
from .modules.base import whole_shape
from .targets import is_excluded, matches_target


@dataclass
class Choice:
    """What becomes of a model's modules.

    Attributes:
        operators: name -> a module, and the operator that stands in for it.
        callers: name -> a module with code of its own, whose calls of functions are replaced. It may have an operator
            as well.
        composites: those of the callers that are computed again if they save much that no operator takes.
        present: names of callers that were prepared before.
        apart: modules that are not targeted, inside of callers.
        reasons: name of a caller -> why it looks like razor's business, and stays as it is if it calls nothing.
        blocks: name -> a module that is computed again as a whole.
        dense: why modules that look like razor's business are left -> their names.
    """

    operators: dict[str, tuple[nn.Module, type[RazorModule]]] = field(default_factory=dict)
    callers: dict[str, tuple[nn.Module, type[RazorInline]]] = field(default_factory=dict)
    composites: dict[str, nn.Module] = field(default_factory=dict)
    present: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    apart: dict[str, nn.Module] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    dense: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def layers(self) -> list[str]:
        """Names of callers that are parts of a model, and of the model itself if it has parameters of its own."""
        callers = ((name, module) for name, (module, _) in self.callers.items())
        return [name for name, module in callers if (RazorRecomputed.handles(module) if name else module._parameters)]

    def keep_targets(self, config: RazorConfig) -> None:
        """Leave out modules that the configuration does not target."""
        chosen = {name: module for name, (module, _) in (*self.operators.items(), *self.callers.items())}
        targeted = {name for name in chosen if matches_target(config, name)}
        self.operators = {name: each for name, each in self.operators.items() if name in targeted}
        self.callers = {name: each for name, each in self.callers.items() if name in targeted}
        around = self.present.union(self.callers)
        left = {name: module for name, module in chosen.items() if name not in targeted and _is_inside(name, around)}
        self.apart = {name: module for name, module in left.items() if can_extend(module, Apart)}
        self.composites = {
            name: module
            for name, module in self.composites.items()
            if name in targeted
            # What is excluded inside of it would run again from an input that is not quite the same.
            and not any(is_excluded(config, f"{name}.{inner}") for inner, _ in module.named_modules() if inner)
        }

    def warn(self, stacklevel: int) -> None:
        """Name the modules that are left dense."""
        warn_dense(self.dense, stacklevel + 1)

    def install(self, config: RazorConfig) -> None:
        """Extend the modules. If that fails, or is interrupted, they all are what they were."""
        every = [(name, module, operator) for name, (module, operator) in self.operators.items()]
        every += [(name, *each) for name, each in self.callers.items()]
        every += [(name, module, RazorRecomputed) for name, module in self.composites.items()]
        every += [(name, module, RazorBlock) for name, module in self.blocks.items()]
        try:
            for name, module, operator in every:
                operator.install(module, config.resolve(name))
            for name, reason in self.reasons.items():
                cast(RazorInline, self.callers[name][0]).razor_reason = reason
            for module in self.apart.values():
                extend(module, Apart)
            stack_blocks(cast(dict[str, RazorBlock], self.blocks))
        except BaseException:
            remove_operators([*(module for _, module, _ in every), *self.apart.values()])
            raise


def choose_operators(
    model: nn.Module,
    config: RazorConfig,
    blocks: Mapping[str, nn.Module] | None = None,
    outermost: Iterable[nn.Module] = (),
) -> Choice:
    """Choose operators for the modules of `model` that have none yet, whether the configuration targets them or not.

    Args:
        model: the model.
        config: its settings.
        blocks: modules that are computed again as a whole, by their names; what is inside of them is left, but for
            layers that keep their input for themselves.
        outermost: the model itself, and the one that PEFT has wrapped in it.
    """
    choice = Choice(blocks=dict(blocks or {}))
    heads, outermost = _heads(model), list(outermost)
    present = [module for module in model.modules() if isinstance(module, RazorBlock)]
    within = {id(inner) for block in (*choice.blocks.values(), *present) for inner in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, RazorInline):
            choice.present.add(name)
        if isinstance(module, RazorModule) and module.kind != "other" and name and not runs_its_class(module):
            choice.dense["its forward was replaced on the instance"].append(name)
        prepared = isinstance(module, (RazorModule, Apart))
        if prepared or (id(module) in within and not RazorQuantizedLinear.keeps_input(module)):
            continue
        operator = next((operator for operator in OPERATORS if operator.handles(module)), None)
        if module in heads and RazorLMHead.handles(module):
            operator = RazorLMHead
        own_code = (operator is None or operator.runs_own_code) and runs_its_class(module)
        if own_code and RazorInline.handles(module) and can_extend(module, RazorInline):
            choice.callers[name] = (module, RazorOutermost if module in outermost else RazorInline)
            if name and config.attention == "recompute" and _may_recompute(module, heads):
                choice.composites[name] = module
        if operator is not None and not name:
            choice.dense["its forward is that of the model itself"].append(type(module).__name__)
        elif operator is not None and not runs_its_class(module):
            choice.dense["its forward was replaced on the instance"].append(name)
        elif operator is not None and not can_extend(module, operator):
            if not (operator.runs_own_code and _is_inside(name, choice.composites)):
                choice.dense["a class such as ABC or Generic comes first among the bases of its class"].append(name)
        elif operator is not None:
            choice.operators[name] = (module, operator)
        elif matches_target(config, name) and not _is_inside(name, choice.composites):
            for operator in OPERATORS:
                reason = operator.cannot_handle(module)
                if reason is not None and name in choice.callers and operator is not RazorAttention:
                    choice.reasons[name] = reason
                elif reason is not None:
                    choice.dense[reason].append(name)
    return choice


def _may_recompute(module: nn.Module, heads: set[nn.Module | None]) -> bool:
    """Whether the module is one that can be computed again."""
    if any(inner in heads for inner in module.modules()):
        return False
    # Offloaded weights are there while Accelerate's hook runs, and not in backward.
    hooked = "forward" in module.__dict__ and any(True for _ in module.parameters(recurse=False))
    return not hooked and RazorRecomputed.handles(module)


def _is_inside(name: str, names: Container[str]) -> bool:
    """Whether the module called `name` is one of these, or in one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(len(parts) + 1))


def remove_operators(modules: Iterable[nn.Module]) -> None:
    """Turn modules back into what they were, weights as they are now."""
    for module in modules:
        if isinstance(module, RazorModule):
            module.clear()
        restore(module, RazorModule, Apart)


def take_copies(model: nn.Module) -> None:
    """Give `model` copies of modules that belong to no model.

    All models of some architectures hold one object, `transformers.activations.gelu`: preparing that would change them
    all.
    """
    common = _common_modules(model)
    copies: dict[nn.Module, nn.Module] = {}
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child in common:
                owner._modules[name] = copies.setdefault(child, copy.deepcopy(child))


def _common_modules(model: nn.Module) -> set[nn.Module]:
    """Modules without state that Python modules and signatures hold, where the classes of `model` were written.

    Not those of the script that runs: what is made there is its author's to share.
    """
    classes: set[Any] = {cls for module in model.modules() for cls in type(module).__mro__}
    held: list[Any] = []
    for source in {cls.__module__ for cls in classes} - {"__main__"}:
        held += vars(sys.modules[source]).values() if source in sys.modules else ()
    for cls in classes:
        if inspect.isfunction(cls.__init__):
            held += cls.__init__.__defaults__ or ()
            held += (cls.__init__.__kwdefaults__ or {}).values()
    for collection in [each for each in held if type(each) in (dict, list, tuple)]:
        held += collection.values() if isinstance(collection, dict) else collection
    inside = {module for module in model.modules() if _has_no_state(module)}
    return {each for each in held if isinstance(each, nn.Module) and each in inside and each is not model}


def _has_no_state(module: nn.Module) -> bool:
    return not any(True for held in (module.parameters(), module.buffers(), module.children()) for _ in held)


def _heads(model: Any) -> set[nn.Module | None]:
    """The layers that give a language model's logits, also of one inside of another module (a reward, a Lightning
    module)."""
    heads: set[nn.Module | None] = set()
    for module in model.modules():
        head: Any = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        # In PEFT's `modules_to_save` each adapter has a copy, beside the original.
        copies = getattr(head, "modules_to_save", None)
        heads |= {head} if copies is None else {head.original_module, *copies.values()}
    # FSMT names an embedding: the head is the linear layer of that shape, whether it shares the weight or not.
    shapes = {whole_shape(head.weight) for head in heads if isinstance(head, nn.Embedding)}
    # One that is parametrized would be computed.
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m._parameters.get("weight") is not None]
    return heads | {module for module in linears if whole_shape(module.weight) in shapes}


def warn_dense(reasons: Mapping[str, list[str]], stacklevel: int) -> None:
    """Name modules that are left dense, by reason."""
    for reason, names in reasons.items():
        warnings.warn(f"saved dense, as {reason}: {_enumerate(names)}", stacklevel=stacklevel + 1)


def _enumerate(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
