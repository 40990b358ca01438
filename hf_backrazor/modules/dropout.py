"""Dropout."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import dropout
from .base import RazorModule


class RazorDropout(RazorModule):
    """`nn.Dropout`, also in place."""

    kind = "dropout"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module).forward is nn.Dropout.forward

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves one bit an element."""
        if self.p == 0:
            return input  # as torch does; for the compiler, what torch returns would be another tensor
        active = self.p < 1 and self.razor_active(input) and self.worth_packing(input)
        if not active or (self.inplace and not self.works_in_place(input)):
            return super().forward(input)
        return dropout(input, self.p, self.inplace)
