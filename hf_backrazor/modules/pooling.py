"""Max pooling."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import Window, max_pool2d
from .base import RazorModule


class RazorMaxPool2d(RazorModule):
    """`nn.MaxPool2d` with windows of at most 256 places that does not return indices."""

    kind = "pooling"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if type(module).forward is not nn.MaxPool2d.forward or module.return_indices:
            return False
        return _window(module).places <= 256

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; saves where in its window each maximum lies."""
        if not self.razor_active(x) or not self.worth_packing(x):
            return super().forward(x)
        return max_pool2d(x, _window(self))

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"razor={4 if _window(self).places <= 16 else 8} bits an output"


def _window(module: nn.MaxPool2d) -> Window:
    def pair(value: int | tuple[int, int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    size = pair(module.kernel_size)
    stride = size if module.stride is None else pair(module.stride)
    return Window(size, stride, pair(module.padding), pair(module.dilation), module.ceil_mode)
