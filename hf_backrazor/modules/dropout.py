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

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; saves one bit an element."""
        active = 0 < self.p < 1 and self.razor_active(x) and self.worth_packing(x)
        if not active or (self.inplace and x._is_view()):  # autograd allows no function of two results to change a view
            return super().forward(x)
        return dropout(x, self.p, self.inplace)
