"""Dropout."""

from __future__ import annotations

from typing import Any

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
        y = packed_dropout(self, input, self.p, self.training, self.inplace)
        return super().forward(input) if y is NotImplemented else y


def packed_dropout(
    module: RazorModule, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """`torch.nn.functional.dropout`, called by `module`, with its mask packed; NotImplemented if it is not."""
    if not (training and 0 < p < 1 and module.packs(input)) or (inplace and not module.works_in_place(input)):
        return NotImplemented
    return dropout(input, p, inplace)
