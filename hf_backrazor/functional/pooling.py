"""Max pooling: where in its window each maximum lies, in four or eight bits; exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..packing.bits import pack_codes, unpack_codes


@dataclass(frozen=True)
class Window:
    """Height and width of each; see `torch.nn.MaxPool2d`."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    @property
    def places(self) -> int:
        """Places in a window."""
        return self.size[0] * self.size[1]


def max_pool2d(x: Tensor, window: Window) -> Tensor:
    """`torch.nn.functional.max_pool2d`, saving neither the input nor 64-bit indices.

    Args:
        x: `(batch, channels, height, width)` or `(channels, height, width)`, float.
        window: at most 256 places.

    Returns:
        As the dense operator, to the bit; and so is the gradient.
    """
    return _MaxPool2d.apply(x, window)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, window: Window) -> Tensor:
        ctx.window, ctx.input_shape = window, x.shape
        y, index = torch.ops.aten.max_pool2d_with_indices(
            x, window.size, window.stride, window.padding, window.dilation, window.ceil_mode
        )
        rows, columns = _origins(window, index)
        width = x.shape[-1]
        row = (torch.div(index, width, rounding_mode="floor") - rows) // window.dilation[0]
        column = (index % width - columns) // window.dilation[1]
        place = (row * window.size[1] + column).to(torch.uint8).reshape(1, -1)
        ctx.save_for_backward(pack_codes(place, 4) if window.places <= 16 else place)
        ctx.pooled_shape = y.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None]:
        (stored,) = ctx.saved_tensors
        window: Window = ctx.window
        numel = ctx.pooled_shape.numel()
        place = unpack_codes(stored, numel, 4, tuple(range(16)), torch.int64) if window.places <= 16 else stored.long()
        place = place.reshape(ctx.pooled_shape)
        rows, columns = _origins(window, place)
        rows = rows + torch.div(place, window.size[1], rounding_mode="floor") * window.dilation[0]
        columns = columns + place % window.size[1] * window.dilation[1]
        shape = grad_output.new_empty(1).expand(ctx.input_shape)  # nothing else is read of the input
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad_output,
            shape,
            window.size,
            window.stride,
            window.padding,
            window.dilation,
            window.ceil_mode,
            rows * ctx.input_shape[-1] + columns,
        ), None


def _origins(window: Window, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column at which each window begins, which may lie in the padding: `(height, 1)` and `(width,)`."""
    rows = torch.arange(pooled.shape[-2], device=pooled.device) * window.stride[0] - window.padding[0]
    columns = torch.arange(pooled.shape[-1], device=pooled.device) * window.stride[1] - window.padding[1]
    return rows.unsqueeze(-1), columns
