"""Pooling, exact: of a maximum, where in its window it lies, in four or eight bits; of an average, nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing.bits import pack_codes, unpack_codes
from .differentiation import twice_differentiable


@dataclass(frozen=True)
class Window:
    """How maxima are taken, each pair for height and width; see `torch.nn.MaxPool2d`."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    MOST_PLACES: ClassVar[int] = 256

    @classmethod
    def of(
        cls,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        ceil_mode: bool,
    ) -> Window:
        """From what `torch.nn.functional.max_pool2d` is given."""
        size = _pair(kernel_size)
        return cls(size, _pair(stride) or size, _pair(padding), _pair(dilation), ceil_mode)

    @property
    def places(self) -> int:
        """Places in a window."""
        return self.size[0] * self.size[1]


def max_pool2d(x: Tensor, window: Window) -> Tensor:
    """`torch.nn.functional.max_pool2d`, saving neither the input nor 64-bit indices.

    Args:
        x: `(batch, channels, height, width)` or `(channels, height, width)`, float.
        window: at most `Window.MOST_PLACES` places.

    Returns:
        As the dense operator, to the bit; and so is the gradient.
    """
    return _MaxPool2d.apply(x, window)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.window, ctx.input_shape = window, x.shape
        y, index = torch.ops.aten.max_pool2d_with_indices(
            x, window.size, window.stride, window.padding, window.dilation, window.ceil_mode
        )
        index = index.int()  # divided faster
        rows, columns = _origins(window, index)
        row = torch.div(index, x.shape[-1], rounding_mode="floor")
        column = (index - row * x.shape[-1]).sub_(columns)
        row -= rows
        if window.dilation != (1, 1):
            row, column = row // window.dilation[0], column // window.dilation[1]
        place = row.mul_(window.size[1]).add_(column).to(torch.uint8).reshape(1, -1)
        ctx.save_for_backward(pack_codes(place, 4) if window.places <= 16 else place)
        ctx.pooled_shape = y.shape
        return y

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (stored,) = ctx.saved_tensors
        window: Window = ctx.window
        numel = ctx.pooled_shape.numel()
        place = unpack_codes(stored, numel, 4, tuple(range(16)), torch.int64) if window.places <= 16 else stored.long()
        place = place.reshape(ctx.pooled_shape)
        rows, columns = _origins(window, place)
        rows = rows + torch.div(place, window.size[1], rounding_mode="floor") * window.dilation[0]
        columns = columns + place % window.size[1] * window.dilation[1]
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad_output,
            _shape_alone(grad_output, ctx.input_shape),
            window.size,
            window.stride,
            window.padding,
            window.dilation,
            window.ceil_mode,
            rows * ctx.input_shape[-1] + columns,
        ), None


def _origins(window: Window, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column at which each window begins, which may lie in the padding: `(height, 1)` and `(width,)`."""
    on: dict[str, Any] = {"device": pooled.device, "dtype": pooled.dtype}
    rows = torch.arange(pooled.shape[-2], **on) * window.stride[0] - window.padding[0]
    columns = torch.arange(pooled.shape[-1], **on) * window.stride[1] - window.padding[1]
    return rows.unsqueeze(-1), columns


@dataclass(frozen=True)
class Averaging:
    """How `torch.nn.functional.avg_pool2d` takes means; see there."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None

    @classmethod
    def of(
        cls,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        padding: int | Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Averaging:
        """From what `torch.nn.functional.avg_pool2d` is given."""
        size = _pair(kernel_size)
        return cls(size, _pair(stride) or size, _pair(padding), ceil_mode, count_include_pad, divisor_override)


def average_pool2d(x: Tensor, averaging: Averaging) -> Tensor:
    """`torch.nn.functional.avg_pool2d`, saving nothing; torch keeps the input, of which the gradient reads the shape.

    Args:
        x: `(batch, channels, height, width)` or `(channels, height, width)`, float.
        averaging: how means are taken.

    Returns:
        As the dense operator, to the bit; and so is the gradient.
    """
    arguments = (
        averaging.size,
        averaging.stride,
        averaging.padding,
        averaging.ceil_mode,
        averaging.count_include_pad,
        averaging.divisor_override,
    )
    return _Linear.apply(x, torch.ops.aten.avg_pool2d, torch.ops.aten.avg_pool2d_backward, arguments)


def adaptive_average_pool2d(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """As `average_pool2d`, for `torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        x: `(batch, channels, height, width)` or `(channels, height, width)`, float.
        output_size: height and width of the result, or one number for both; None: that of `x`.
    """
    pair = (output_size,) * 2 if isinstance(output_size, int) else output_size
    output_size = tuple(have if want is None else want for want, have in zip(pair, x.shape[-2:], strict=True))
    if output_size == (1, 1):  # a mean, for which torch keeps nothing either
        return F.adaptive_avg_pool2d(x, output_size)
    aten = torch.ops.aten
    return _Linear.apply(x, lambda x: aten._adaptive_avg_pool2d(x, output_size), aten._adaptive_avg_pool2d_backward, ())


class _Linear(torch.autograd.Function):
    """A linear function whose gradient operator asks for the input, and reads its shape alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[..., Tensor],
        gradient: Callable[..., Tensor],
        arguments: tuple[Any, ...],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.arguments, ctx.input_shape = gradient, arguments, x.shape
        return function(x, *arguments)

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        shape = _shape_alone(grad_output, ctx.input_shape)
        return ctx.gradient(grad_output, shape, *ctx.arguments), None, None, None


def _pair(value: int | Sequence[int] | None) -> tuple[int, int] | Any:
    """A number for height and one for width, where one may stand for both; nothing for none."""
    if value is None or isinstance(value, int):
        return () if value is None else (value, value)
    return tuple(value) * (2 // len(value)) if len(value) else ()


def _shape_alone(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape in the memory of a single element."""
    return like.new_empty(1).expand(shape)
