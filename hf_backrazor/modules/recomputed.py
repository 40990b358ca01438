"""Modules that save much for which razor has no operator: they are computed again in backward, from packed inputs.

What a module's own code computes, razor knows by its parts: the layers in it, functions that it calls. Attention that
is written out, a scan over states, products of experts' weights are no such parts. The first forward of each module in
training is therefore looked at, before the one that counts: if what is left over is more than what its inputs take,
then these are stored, in 8 bits, and the module runs once more in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..compat import (
    FakeTensor,
    code_of_its_own,
    detect_fake_mode,
    in_checkpoint,
    keeps_parametrized,
    traceable,
    tree_leaves,
    tree_map,
)
from ..config import RazorConfig
from ..functional.checkpoint import packed_checkpoint
from ..functional.rng import forked_rng
from ..functional.sharing import pack_shared
from ..functional.stream import StoredInput
from ..packing import PackSpec
from .adapter import RazorAdapter
from .again import Changes, State, argument_names, is_cache, is_mask, row_dims, without_caches
from .base import RazorModule
from .probe import Probe, dense, has_hooks_inside, is_probing, operator_running

# 8 bits, with some elements exact, have a cosine of 0.9999: what is computed from them is right but for that.
INPUT_BITS = 8

# A module is computed again if what it saves loosely is so many times what its packed inputs take.
WORTH = 2.0

# Of each parametrized module, in order: names of tensors, and how many parametrizations each has.
Parametrized = list[dict[str, int]]


class Decision:
    """What the first forward of a module has shown. Replicas of a model share it.

    Attributes:
        again: whether the module is computed again; None: not known yet.
        exact: whether its inputs are kept as they are, as values decide what it does.
        changing: what its forward changes, as batch norms do their statistics.
        parametrized: what is parametrized in it, whether it is running or not.
        estimated: what a forward on fake tensors has shown, in the last estimate or trace of the compiler.
    """

    def __init__(self, parametrized: Parametrized) -> None:
        self.again: bool | None = None
        self.exact = False
        self.changing = Changes((), (), draws=False)
        self.parametrized = parametrized
        self.estimated: Decision | None = None
        self._mode: ref | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "estimated": None, "_mode": None}

    def of_estimate(self, mode: Any) -> Decision:
        """The one of an estimate on fake tensors of this mode, where there are no values to look at."""
        if self.estimated is None or self._mode is None or self._mode() is not mode:
            self.estimated, self._mode = Decision(self.parametrized), ref(mode)
        return self.estimated


class RazorRecomputed(RazorModule):
    """A module with code of its own that may be computed again in backward. It is a `RazorInline` as well.

    Attributes:
        razor_decision: whether it is.
    """

    name_prefix = ""
    runs_own_code = True
    razor_decision: Decision

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`: modules with code of their own, up to the layers that models are stacks of."""
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            return True
        containers = (PreTrainedModel, nn.ModuleList, nn.ModuleDict, nn.Sequential)
        if type(module).__module__.startswith("torch.") or isinstance(module, containers):
            return False
        return not _holds_stack(module)

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        super().install(module, config)
        assert isinstance(module, cls)
        module.razor_decision = Decision(_parametrized(module))

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: a forward with the signature of what is extended."""

        @traceable
        def estimate(self: RazorRecomputed, *args: Any, **kwargs: Any) -> tuple[()]:
            # The compiler runs this several times, and the first time on nothing but fake tensors.
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if not all(isinstance(x, FakeTensor) for x in tensors):
                return ()
            # A module that this one is in may have looked at it.
            if self.razor_decision.of_estimate(detect_fake_mode(tensors)).again is None:
                _forward(self, functools.partial(extended.forward, self), args, kwargs)
            return ()

        @code_of_its_own
        @functools.wraps(extended.forward)
        def forward(self: RazorRecomputed, *args: Any, **kwargs: Any) -> Any:
            decision = self.razor_decision
            if torch.compiler.is_dynamo_compiling() and self.training and decision.again is None:
                # Caches are for no graph, and not filled by what is computed again.
                given = (None if is_cache(x) else x for x in args)
                estimate(self, *given, **{name: x for name, x in kwargs.items() if not is_cache(x)})
                # The compiler reads the forward of a module that is not computed again. Where it ran the estimate on no
                # fake tensors, nothing is known: it breaks its graph, and the module is looked at.
                if decision.estimated is not None and not decision.estimated.again:
                    return extended.forward(self, *args, **kwargs)
            if not self.training or decision.again is False:
                return extended.forward(self, *args, **kwargs)
            return _forward(self, functools.partial(extended.forward, self), args, kwargs)

        return {"forward": forward}

    @property
    def kind(self) -> str:  # type: ignore[override]  # which of an operator is one for all
        """See `RazorModule`: that of its operator, if it has one."""
        kind = super().kind
        return "recomputed" if self.razor_decision.again and kind in ("inline", "other") else kind

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        if "razor_decision" not in self.__dict__ or not self.razor_decision.again:
            return super().razor_repr()
        return "razor=computed again from its inputs" + ("" if self.razor_decision.exact else f" in {INPUT_BITS} bits")


# Functions, as the class that is extended may have methods of any name.
@torch.compiler.disable(reason="packed tensors are stored")
def _forward(
    module: RazorRecomputed, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `function`, the forward of what was extended, returns; computed again in backward if that is worth it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    # In the paper's form nothing is computed again.
    kept = module.razor_config.attention == "sparse" or _parametrized_outside(module)
    if kept or not module.razor_active(*tensors, *module.parameters()):
        return function(*args, **kwargs)
    decision = module.razor_decision
    if decision.again is None and (mode := detect_fake_mode(tensors)) is not None:
        decision = decision.of_estimate(mode)
    names = argument_names(module.plain_class.forward)
    arguments = without_caches(module, names, args, kwargs, warns=decision.again is True)
    if arguments is None:
        return function(*args, **kwargs)
    if decision.again is None and not has_hooks_inside(module):
        if is_probing():
            return _look(decision, module, function, *arguments)
        _decide(decision, module, function, *arguments)
    if not decision.again or in_checkpoint():
        return function(*args, **kwargs)
    args, kwargs = arguments
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    masks = [value for name, value in given.items() if is_mask(name, value)]
    plain = functools.partial(_plainly, function)
    again = functools.partial(State(module, decision.changing).call, plain)
    packed = [
        (x, StoredInput(0, pack_shared(x, spec, derived=False)).unpack)
        for x, spec in _packed_inputs(decision, module, args, kwargs)
    ]
    with operator_running():
        return packed_checkpoint(plain, args, kwargs, packed, masks, again)


def _decide(
    decision: Decision,
    module: RazorRecomputed,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run the module once to look at it, and leave no trace of that."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    # Of copies, as the module may change its arguments in place.
    copies = {id(x): x.clone() for x in tensors}
    args, kwargs = tree_map(lambda x: copies.get(id(x), x), (args, kwargs))
    with State(module).restored(), forked_rng(x.device for x in tensors):
        _look(decision, module, function, args, kwargs)


def _look(
    decision: Decision,
    module: RazorRecomputed,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Decide by what the module saves, and return what it does."""
    tensors = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    versions = {key: x._version for key, x in tensors.items()}
    inputs = [x for x in tensors.values() if x.requires_grad]
    # DoRA is given the layer that it belongs to.
    modules = [module, *(x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Module))]
    there = [x for each in modules for x in (*each.parameters(), *each.buffers())]
    probe = Probe([*there, *(x for x in tensors.values() if not x.requires_grad)], inputs)
    before = State(module)
    with probe.watching():
        result = function(*args, **kwargs)
    decision.changing = before.changed()
    decision.exact = probe.branches
    specs = {id(x): spec for x, spec in _packed_inputs(decision, module, args, kwargs)}
    stored = sum(_stored_bytes(x, specs.get(id(x))) for x in inputs)
    worth = probe.loose_bytes > max(WORTH * stored, probe.packed_bytes, module.razor_config.min_numel)
    # It would change what is kept of its arguments. And what it checkpoints itself would run in backward when its own
    # second run is over, where operators pack again.
    changes = any(x._version != versions[key] for key, x in tensors.items())
    decision.again = worth and not (changes or probe.checkpoints)
    if decision.again:
        probe.replace(round(stored))
    return result


def _parametrized(module: nn.Module) -> Parametrized:
    inside: Iterator[Any] = (inner for inner in module.modules() if "parametrizations" in inner._modules)
    return [{name: len(each) for name, each in inner.parametrizations.items()} for inner in inside]


def _parametrized_outside(module: RazorRecomputed) -> bool:
    """Whether code around the module has parametrized it for as long as that runs, or keeps what that computes.

    PEFT's adapters of experts do. In backward the module would run without; what is around it can run again.
    """
    present = _parametrized(module)
    return present != module.razor_decision.parametrized or (bool(present) and keeps_parametrized())


def _packed_inputs(
    decision: Decision, module: RazorRecomputed, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Tensor, PackSpec]]:
    """Those among the arguments that are stored packed, and how."""
    config = module.razor_config
    if config.activation_bits > 8 or not config.sparsity or decision.exact:
        return
    for x in {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values():
        if x.requires_grad and x.dim() > 1 and module.worth_packing(x):
            yield x, _spec(module, x)


def _spec(module: RazorRecomputed, x: Tensor) -> PackSpec:
    config = module.razor_config
    return PackSpec(config.sparsity, "row", INPUT_BITS, config.value_dtype, row_dims=row_dims(module, x))


def _holds_stack(module: nn.Module) -> bool:
    """Whether the layers that a model is a stack of are inside, so that it is not one of these, nor part of one."""
    for inner in module.modules():
        if inner is not module and isinstance(inner, (GradientCheckpointingLayer, PreTrainedModel)):
            return True
        if isinstance(inner, (nn.ModuleList, nn.Sequential)) and sum(map(_is_composite, inner)) > 1:
            return True
    return False


def _is_composite(module: Any) -> bool:
    """Whether this is a layer with weights that is none of torch's, adapters aside."""
    module = module.get_base_layer() if RazorAdapter.handles(module) else module
    own = not type(module).__module__.startswith("torch.")
    return (own or any(map(_is_composite, module.children()))) and any(p.dim() > 1 for p in module.parameters())


def _plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with dense():
        return function(*args, **kwargs)


def _stored_bytes(x: Tensor, spec: PackSpec | None) -> float:
    return x.numel() * (x.element_size() if spec is None else spec.bits / 8)
