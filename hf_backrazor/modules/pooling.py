"""Pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..functional import Averaging, Window, adaptive_average_pool2d, average_pool2d, max_pool2d
from .base import RazorModule


class RazorMaxPool2d(RazorModule):
    """`nn.MaxPool2d` with windows of at most 256 places that does not return indices."""

    kind = "pooling"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if type(module).forward is not nn.MaxPool2d.forward or module.return_indices:
            return False
        return _window(module).places <= Window.MOST_PLACES

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        if not isinstance(module, nn.MaxPool2d) or cls.handles(module):
            return None
        if module.return_indices:
            return f"{type(module).__name__} returns indices"
        return f"{type(module).__name__} has a forward of its own, or windows of more than {Window.MOST_PLACES} places"

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves where in its window each maximum lies."""
        return max_pool2d(input, _window(self)) if self.packs(input) else super().forward(input)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"razor={4 if _window(self).places <= 16 else 8} bits an output"


class RazorAveragePool2d(RazorModule):
    """`nn.AvgPool2d` and `nn.AdaptiveAvgPool2d`."""

    kind = "pooling"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module).forward in (nn.AvgPool2d.forward, nn.AdaptiveAvgPool2d.forward)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves nothing."""
        if not self.packs(input):
            return super().forward(input)
        if isinstance(self, nn.AdaptiveAvgPool2d):
            # Declared to be None as well, which torch does not take.
            return adaptive_average_pool2d(input, self.output_size)  # type: ignore[arg-type]
        averaging = Averaging.of(
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        return average_pool2d(input, averaging)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return "razor=nothing saved"


def _window(module: Any) -> Window:
    """Of an `nn.MaxPool2d`."""
    return Window.of(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
