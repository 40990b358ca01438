"""Padding with zeros."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import zero_pad
from .base import RazorModule


class RazorZeroPad(RazorModule):
    """`nn.ZeroPad1d` to `nn.ZeroPad3d`, and constant padding by zero."""

    kind = "padding"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module).forward is nn.ZeroPad2d.forward and bool(module.value == 0)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; lets the next convolution read what is saved before the padding."""
        if input.dim() != 2 + len(self.padding) // 2 or not self.razor_active(input):
            return super().forward(input)
        return zero_pad(input, self.padding)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return "razor=nothing saved"
