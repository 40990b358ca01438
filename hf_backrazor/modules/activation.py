"""Activation functions: those of `ACT2FN` and their counterparts in `torch.nn`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import activations as hf

from ..compat import in_checkpoint
from ..config import RazorConfig
from ..functional import activation
from ..functional.activation import (
    GELU,
    GELU_TANH,
    HARDSIGMOID,
    HARDSWISH,
    MISH,
    QUICK_GELU,
    RELU,
    RELU6,
    SIGMOID,
    SILU,
    TANH,
    ActivationRule,
    cell_tables,
    leaky_relu,
)
from ..functional.notes import Note
from .base import RazorModule, activation_bits, gate_spec, stand_in

# Class -> what is known of its derivative (or how to find that for an instance). None: autograd finds it from the
# input, kept in half precision.
RULES: dict[type[nn.Module], ActivationRule | Callable[[Any], ActivationRule] | None] = {
    hf.GELUActivation: GELU,
    hf.GELUTanh: GELU_TANH,
    hf.NewGELUActivation: GELU_TANH,
    hf.FastGELUActivation: GELU_TANH,
    hf.AccurateGELUActivation: GELU_TANH,
    hf.QuickGELUActivation: QUICK_GELU,
    hf.SiLUActivation: SILU,
    hf.MishActivation: MISH,
    hf.ClippedGELUActivation: None,
    hf.LaplaceActivation: None,
    hf.ReLUSquaredActivation: None,
    hf.XIELUActivation: None,
    nn.GELU: lambda module: GELU if module.approximate == "none" else GELU_TANH,
    nn.SiLU: SILU,
    nn.Mish: MISH,
    nn.Hardswish: HARDSWISH,
    nn.Hardsigmoid: HARDSIGMOID,
    nn.Tanh: TANH,
    nn.Sigmoid: SIGMOID,
    nn.ReLU: RELU,
    nn.ReLU6: RELU6,
    nn.LeakyReLU: lambda module: leaky_relu(module.negative_slope),
    nn.ELU: None,
    nn.SELU: None,
    nn.CELU: None,
    nn.Softplus: None,
    nn.PReLU: None,
}
if hasattr(hf, "SqrtSoftplusActivation"):  # in newer versions of Transformers
    RULES[hf.SqrtSoftplusActivation] = None


class Gate:
    """Whether what an activation function returns is multiplied with another tensor. Replicas of a model share it."""

    multiplied = False


class RazorActivation(RazorModule):
    """An activation function that stands as a module, also one that works in place.

    Attributes:
        razor_gate: whether its output is multiplied with another tensor.
    """

    kind = "activation"
    razor_gate: Gate

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module) in RULES

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        super().install(module, config)
        assert isinstance(module, cls)
        module.razor_gate = Gate()
        if module.rule is not None and config.activation_bits <= 8:
            # Now, and not in the first forward: that may be traced, or run on fake tensors.
            cell_tables(module.rule, config.activation_bits)

    @property
    def rule(self) -> ActivationRule | None:
        """What is known of the derivative."""
        rule = RULES[self.plain_class]
        return rule if rule is None or isinstance(rule, ActivationRule) else rule(self)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves `input`, in few bits or as it is."""
        # Most have nothing inside.
        own = bool(self._parameters or self._modules)
        parameters = dict(self.named_parameters(remove_duplicate=False)) if own else {}
        # Parametrized ones would be computed again in backward.
        active = self.packs(input, *parameters.values()) and not self.is_parametrized()
        inplace = getattr(self, "inplace", False)
        if not active or (inplace and not self.works_in_place(input)):
            return super().forward(input)
        bits = activation_bits(self.razor_config, input)
        if parameters:
            forward = partial(_forward_with, self, tuple(parameters))
            return activation(input, forward, None, bits, tuple(parameters.values()), inplace)
        gate = self.razor_gate
        # Of tokens; a gate of feature maps has one element a channel.
        spec = gate_spec(self.razor_config) if gate.multiplied and input.dim() < 4 else None
        y = activation(input, super().forward, self.rule, bits, inplace=inplace, spec=spec)
        if not gate.multiplied:
            _Activated(gate).attach(y)
        return y

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        rule, bits = self.rule, self.razor_config.activation_bits
        if rule is not None and rule.steps is not None:
            return "razor=derivative in 1 bit"
        if rule is not None and bits <= 8:
            return f"razor=input in {bits} bits"
        return f"razor=input in {max(bits, 16)} bits"


def _forward_with(module: RazorActivation, names: Sequence[str], x: Tensor, *parameters: Tensor) -> Tensor:
    """The plain module's forward, with these tensors for its parameters."""
    return module.plain_class.forward(stand_in(module, dict(zip(names, parameters, strict=True))), x)


def count_gates(model: nn.Module) -> int:
    """How many activation functions in `model` are known to be gates."""
    return sum(module.razor_gate.multiplied for module in model.modules() if isinstance(module, RazorActivation))


def note_multiplied(x: Tensor) -> None:
    """Note that `x`, which an activation function may have returned, is multiplied with another tensor.

    That function saves its input in another way from now on. Not under checkpointing, which has to save the same once
    more.
    """
    activated = _Activated.of(x) or (None if x._base is None else _Activated.of(x._base))
    if activated is not None and not in_checkpoint():
        activated.gate.multiplied = True


@dataclass
class _Activated(Note):
    """What an activation function returned.

    Attributes:
        gate: the function's.
    """

    name = "_razor_activated"

    gate: Gate
