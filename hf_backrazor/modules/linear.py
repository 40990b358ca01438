"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..functional import linear
from ..functional.precision import compute_dtype
from .base import RazorModule, describe, input_spec, linear_spec


class RazorLinear(RazorModule):
    """`nn.Linear`, and subclasses that leave its forward alone."""

    kind = "linear"
    plain_type: type[nn.Module] = nn.Linear
    transposed = False

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return False  # a part of nn.MultiheadAttention, which never calls it
        return isinstance(module, cls.plain_type) and type(module).forward is cls.plain_type.forward

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        # With a frozen weight it saves no input.
        own = isinstance(module, cls.plain_type) and type(module).forward is not cls.plain_type.forward
        if own and module.weight.requires_grad:
            return f"{type(module).__name__} has a forward of its own"
        return None

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves `input` packed where the weight is being trained."""
        config = self.razor_config
        if self.razor_active(parameters=("weight",)) and self.worth_packing(input):
            spec = linear_spec(config, input)
            return linear(input, self.weight, self.bias, spec, self.transposed, config.weight_gradient)
        if self._casts_frozen_weight(input):
            return linear(input, self.weight, self.bias, None, self.transposed)
        return super().forward(input)

    def _casts_frozen_weight(self, input: Tensor) -> bool:
        """Whether autograd would save a frozen weight as autocast casts it: half of the model once more, under LoRA."""
        if self.is_parametrized() or self.weight.requires_grad or not self.razor_active(input):
            return False
        # Quantised weights are tensors of other classes, and have a way of their own to multiply.
        plain = type(self.weight) in (Tensor, nn.Parameter) and input.is_floating_point()
        return plain and self.weight.dtype not in (compute_dtype(input), torch.float64)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return describe(input_spec(self.razor_config))


class RazorConv1D(RazorLinear):
    """GPT-2's linear layer with a transposed weight."""

    plain_type = Conv1D
    transposed = True

    def __repr__(self) -> str:
        # Conv1D writes its own, without `extra_repr`.
        return f"Razor{super().__repr__().removesuffix(')')}, {self.razor_repr()})"
