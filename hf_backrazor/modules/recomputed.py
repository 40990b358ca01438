"""Modules that save much for which razor has no operator: they are computed again in backward, from packed inputs.

What a module's own code computes, razor knows by its parts: the layers in it, functions that it calls. Attention that is
written out, a scan over states, products of experts' weights are no such parts. The first forward of each module in
training is therefore looked at, before the one that counts: if what is left over is more than what its inputs take,
then these are stored, in 8 bits, and the module runs once more in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..compat import in_checkpoint
from ..config import RazorConfig
from ..functional.checkpoint import packed_checkpoint
from ..functional.sharing import pack_whole
from ..functional.stream import StoredInput
from ..packing import PackSpec
from .again import argument_names, is_mask, with_buffers, without_caches
from .base import RazorModule
from .probe import Probe, dense, operator_running

# 8 bits, with some elements exact, have a cosine of 0.9999: what is computed from them is right but for that.
INPUT_BITS = 8

# A module is computed again if what it saves loosely is so many times what its packed inputs take.
WORTH = 2.0


class Decision:
    """What the first forward of a module has shown. Replicas of a model share it.

    Attributes:
        again: whether the module is computed again; None: not known yet.
        exact: whether its inputs are kept as they are, as values decide what it does.
        changing: names of the buffers that its forward changes, as batch norms do.
        loose_bytes: what it saves for which razor has no operator.
    """

    def __init__(self) -> None:
        self.again: bool | None = None
        self.exact = False
        self.changing: tuple[str, ...] = ()
        self.loose_bytes = 0


class RazorRecomputed(RazorModule):
    """A module made of others, or with code of its own, that may be computed again in backward.

    Attributes:
        razor_decision: whether it is.
    """

    kind = "recomputed"
    name_prefix = ""
    runs_own_code = True
    razor_decision: Decision

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`: modules with code of their own, up to the layers that models are stacks of."""
        containers = (PreTrainedModel, nn.ModuleList, nn.ModuleDict, nn.Sequential)
        if type(module).__module__.startswith("torch.") or isinstance(module, containers):
            return False
        return not _holds_stack(module)

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        super().install(module, config)
        module.razor_decision = Decision()

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: a forward with the signature of what is extended."""

        @functools.wraps(extended.forward)
        def forward(self: RazorRecomputed, *args: Any, **kwargs: Any) -> Any:
            return self._forward(functools.partial(extended.forward, self), args, kwargs)

        if issubclass(extended, RazorModule):
            return {"forward": forward, "kind": extended.kind}
        # Nothing here that the compiler could not read, but for a forward that razor leaves as it is then.
        return {"forward": forward, "__call__": extended.__call__}

    def _forward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not self.training:
            return function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        decision = self.razor_decision
        if decision.again is False or in_checkpoint() or not self.razor_active(*tensors, *self.parameters()):
            return function(*args, **kwargs)
        names = argument_names(self.plain_class)
        arguments = without_caches(self, names, args, kwargs, warns=decision.again is True)
        if arguments is None:
            return function(*args, **kwargs)
        if decision.again is None:
            self._decide(function, *arguments)
        if not decision.again:
            return function(*args, **kwargs)
        args, kwargs = arguments
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        masks = [value for name, value in given.items() if is_mask(name, value)]
        buffers = {name: self.get_buffer(name).clone() for name in decision.changing}
        plain = functools.partial(_plainly, function)
        again = functools.partial(with_buffers, self, buffers, plain)
        packed = [(x, StoredInput(0, pack_whole(x, spec)).unpack) for x, spec in self._packed_inputs(args, kwargs)]
        with operator_running():
            return packed_checkpoint(plain, args, kwargs, packed, masks, again)

    def _decide(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the module, and see what that saves."""
        decision = self.razor_decision
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [*self.parameters(), *self.buffers(), *(x for x in tensors if not x.requires_grad)]
        inputs = [x for x in tensors if x.requires_grad]
        probe = Probe(known, inputs)
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        with _random_state_of(tensors), probe:
            changed = with_buffers(self, buffers, self._run_and_compare, function, buffers, args, kwargs)
        decision.loose_bytes, decision.exact = probe.loose_bytes, probe.branches
        decision.changing = changed
        packed = {id(x): spec for x, spec in self._packed_inputs(args, kwargs)}
        inputs_bytes = sum(_stored_bytes(x, packed.get(id(x))) for x in {id(x): x for x in inputs}.values())
        decision.again = probe.loose_bytes > max(WORTH * inputs_bytes, probe.packed_bytes, self.razor_config.min_numel)

    def _run_and_compare(
        self, function: Callable[..., Any], before: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> tuple[str, ...]:
        """Names of the buffers that `function` changes."""
        function(*args, **kwargs)
        # By their values: batch norms change their statistics without a new version.
        return tuple(name for name, value in before.items() if not _is_same(self.get_buffer(name), value))

    def _packed_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, PackSpec]]:
        """Those among the arguments that are stored packed, and how."""
        config = self.razor_config
        if config.activation_bits == 32 or not config.sparsity or self.razor_decision.exact:
            return
        for x in {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values():
            if x.requires_grad and x.dim() > 1 and self.worth_packing(x):
                yield x, self._spec(x)

    def _spec(self, x: Tensor) -> PackSpec:
        config = self.razor_config
        if config.activation_bits == 16:
            return PackSpec(value_dtype="float16")
        row_dims = x.dim() - 2 if x.dim() > 3 and _has_convolutions(self, x.dim() - 2) else 1
        return PackSpec(config.sparsity, "row", INPUT_BITS, config.value_dtype, row_dims=row_dims)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        if "razor_decision" not in self.__dict__ or not self.razor_decision.again:
            return super().razor_repr()
        return "razor=computed again from its inputs" + ("" if self.razor_decision.exact else f" in {INPUT_BITS} bits")


def _holds_stack(module: nn.Module) -> bool:
    """Whether the layers that a model is a stack of are inside, so that it is not one of these, nor part of one."""
    for inner in module.modules():
        if inner is not module and isinstance(inner, (GradientCheckpointingLayer, PreTrainedModel)):
            return True
        if isinstance(inner, (nn.ModuleList, nn.Sequential)) and sum(map(_is_composite, inner)) > 1:
            return True
    return False


def _is_composite(module: nn.Module) -> bool:
    """Whether this is a layer with weights that is none of torch's."""
    own = not type(module).__module__.startswith("torch.")
    return (own or any(map(_is_composite, module.children()))) and any(p.dim() > 1 for p in module.parameters())


def _plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with dense():
        return function(*args, **kwargs)


def _is_same(x: Tensor, y: Tensor) -> bool:
    return x.is_meta or torch.equal(x, y)


def _random_state_of(tensors: list[Tensor]) -> Any:
    devices = {x.device for x in tensors} - {torch.device("cpu"), torch.device("meta")}
    device_type = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(devices=list(devices), device_type=device_type)


def _stored_bytes(x: Tensor, spec: PackSpec | None) -> float:
    if spec is None:
        return x.numel() * x.element_size()
    return x.numel() * (spec.bits / 8 if spec.bits else 2)


def _has_convolutions(module: nn.Module, dimensions: int) -> bool:
    return any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]) for m in module.modules())
