"""Dropout."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import dropout
from .base import RazorModule


class RazorDropout(RazorModule):
    """`nn.Dropout`."""

    kind = "dropout"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`. In-place dropout is left alone: it has a contract with its caller."""
        return type(module).forward is nn.Dropout.forward and not module.inplace

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        if type(module).forward is nn.Dropout.forward and module.inplace:
            return f"{type(module).__name__} works in place"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; saves one bit an element."""
        if not 0 < self.p < 1 or not self.razor_active(x) or not self.worth_packing(x):
            return super().forward(x)
        return dropout(x, self.p)
