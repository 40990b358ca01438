"""Linear layers with quantised weights, frozen as under adapters."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from ..functional.frozen_linear import frozen_linear
from .base import RazorModule, stand_in

# Layers of other packages that hold on to their input, or to their weight as it is dequantised. bitsandbytes' layers in
# 4 bits do neither.
_LAYERS = ("bitsandbytes.nn.modules.Linear8bitLt",)
_WEIGHTS = ("torchao.",)


class RazorQuantizedLinear(RazorModule):
    """A frozen linear layer in 8 bits of bitsandbytes, or with a quantised weight of torchao.

    The gradient of its input is a product with its weight, whatever the input was. Yet bitsandbytes keeps the input
    (out of sight of autograd, in an attribute), and torchao the weight in the dtype of the input.
    """

    kind = "linear"
    is_traced = False

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        weight = module._parameters.get("weight")  # one that is parametrized would be computed
        if not isinstance(module, nn.Linear) or weight is None or weight.requires_grad:
            return False
        if cls.keeps_input(module):
            return True
        # Where the input is quantised as well, what torchao computes has no gradient.
        by_weight_alone = getattr(weight, "act_quant_kwargs", None) is None
        plain = type(module).forward is nn.Linear.forward and type(weight).__module__.startswith(_WEIGHTS)
        return plain and by_weight_alone

    @classmethod
    def keeps_input(cls, module: nn.Module) -> bool:
        """Whether the plain module keeps its input where checkpointing cannot drop it either."""
        return any(f"{base.__module__}.{base.__qualname__}" in _LAYERS for base in type(module).__mro__)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves nothing but the quantised weight where nothing of the module is being trained."""
        if not self.razor_active(input) or any(p.requires_grad for p in self.parameters(recurse=False)):
            return super().forward(input)
        # Without hooks, which have seen the call.
        return frozen_linear(functools.partial(self.plain_class.forward, stand_in(self, self._parameters)), input)
