"""Convolutions of any number of dimensions: dX and db exact, dW from the packed input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Layout, Packed, PackSpec
from ..shapes_only import turns
from .differentiation import is_wanted, restored, saved_parts, twice_differentiable
from .layouts import PaddedLayout
from .padding import zero_pad
from .precision import accumulate_dtype, compute_dtype
from .sharing import pack_shared

# Elements of the input that are unpacked at a time for the weight's gradient. More gain nothing, and blocks of more
# than a few MiB go back to the system when they are free: a step of MobileNetV2 takes 0.44 s with 2^20, 0.51 with 2^22.
CONVOLUTION_NUMEL = {"cpu": 2**20}


@dataclass(frozen=True)
class Geometry:
    """How a convolution's kernel moves; see `torch.nn.Conv2d` and `torch.nn.ConvTranspose2d`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        weight: Tensor,
        stride: int | Sequence[int],
        padding: int | Literal["valid"] | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        output_padding: Sequence[int] | None = None,
    ) -> Geometry:
        """From what `torch.nn.functional.conv2d` and its like are given; transposed if there is an `output_padding`."""
        size = tuple(weight.shape[2:])
        stride, dilation = _for_each(stride, size), _for_each(dilation, size)
        padding = 0 if padding == "valid" else padding
        transposed = output_padding is not None
        output_padding = (0,) * len(size) if output_padding is None else tuple(output_padding)
        return cls(stride, _for_each(padding, size), dilation, transposed, output_padding, groups)

    def padded(self, margins: Sequence[int]) -> Geometry:
        """With so many more zeros on either side of each dimension."""
        return replace(self, padding=tuple(p + m for p, m in zip(self.padding, margins, strict=True)))

    def backward(
        self, grad_output: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, each if it is `wanted`; only the weight's reads the values of `x`."""
        return torch.ops.aten.convolution_backward(
            grad_output,
            x,
            weight,
            [grad_output.shape[1]] if wanted[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            wanted,
        )


def _for_each(value: int | Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """A number for each dimension, where one may stand for all."""
    return (value,) * len(size) if isinstance(value, int) else tuple(value) * (len(size) // len(value))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    forward: Callable[[Tensor], Tensor],
    spec: PackSpec,
) -> Tensor:
    """A convolution with a packed input saved for the weight's gradient.

    dX and db do not read the input, and are exact; dW takes it from its packed copy, some samples at a time. An
    input without a gradient (an image) is kept as it is; with a frozen weight, nothing is.

    Args:
        x: `(batch, channels, *spatial)`, float; under autocast the copy is packed in autocast's dtype.
        weight: the kernel.
        bias: `(out_channels,)` or None.
        geometry: how the kernel moves.
        forward: computes the output from `x`.
        spec: how `x` is packed, where no other operator's copy serves (see `pack_shared`).

    Returns:
        As `forward(x)`.
    """
    if not x.requires_grad:  # the images themselves, which are there anyway
        spec = PackSpec(row_dims=spec.row_dims)
    packed = pack_shared(x, spec, compute_dtype(x)) if weight.requires_grad else None
    return _Convolution.apply(x, weight, bias, geometry, forward, packed)


def convolution_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    spec: PackSpec,
) -> Tensor:
    """`convolution` with `padding="same"`: as large as its input. For the arguments see there and `torch.nn.Conv2d`.

    An even kernel needs one zero more behind than before. As torch does, this pads the input by that, and lets the
    convolution pad the rest.
    """
    size = tuple(weight.shape[2:])
    total = tuple(d * (k - 1) for d, k in zip(_for_each(dilation, size), size, strict=True))
    before = tuple(t // 2 for t in total)
    uneven = [t - 2 * b for t, b in zip(total, before, strict=True)]
    if any(uneven):
        x = zero_pad(x, [side for each in reversed(uneven) for side in (0, each)])
    function = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    moves: dict[str, Any] = {"stride": stride, "padding": before, "dilation": dilation, "groups": groups}
    geometry = Geometry.of(weight, **moves)
    return convolution(x, weight, bias, geometry, partial(function, weight=weight, bias=bias, **moves), spec)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        forward: Callable[[Tensor], Tensor],
        packed: Packed | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layout = None if packed is None else packed.layout
        parts = () if packed is None else saved_parts(x, packed)
        ctx.geometry = geometry
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *parts)
        return forward(x)

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        kernel = weight.to(grad_output.dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shape = _shape_alone(grad_output, ctx.input_shape)
        grad_input, _, grad_bias = ctx.geometry.backward(grad_output, shape, kernel, (needs_x, False, needs_bias))
        if needs_weight and torch.is_grad_enabled():
            needs_weight = is_wanted(ctx, 1)
        grad_weight = _grad_weight(ctx, grad_output, kernel, parts) if needs_weight else None
        return (
            grad_input.to(ctx.input_dtype) if needs_x else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias.to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def _shape_alone(like: Tensor, shape: torch.Size) -> Tensor:
    """An input of which only the shape is read."""
    if like.device.type == "cpu":
        # torch makes inputs contiguous here; memory that nobody writes to is never mapped.
        return like.new_empty(shape)
    return like.new_empty(1).expand(shape)


def _grad_weight(ctx: Any, grad_output: Tensor, kernel: Tensor, parts: Sequence[Tensor]) -> Tensor:
    layout, shape, geometry = ctx.layout, ctx.input_shape, ctx.geometry
    if torch.is_grad_enabled():
        x = restored(layout, parts, grad_output.dtype, constant=not ctx.needs_input_grad[0])
        return geometry.backward(grad_output, x, kernel, (False, True, False))[1]
    if isinstance(layout, PaddedLayout) and (margins := layout.margins) and not geometry.transposed:
        # Padding that the gradient's convolution does itself takes no copy.
        shape = torch.Size((*shape[:2], *layout.spatial))
        layout, geometry = layout.x, geometry.padded(margins)
    total = None
    for start, stop, x in _samples(layout, shape, parts, grad_output.dtype):
        grads = geometry.backward(grad_output[start:stop], x, kernel, (False, True, False))
        if total is None:
            total = grads[1] if stop == shape[0] else grads[1].to(accumulate_dtype(grads[1]))
        else:
            total += grads[1]
        del grads  # not to be held while the next samples are unpacked, and their gradient made
    assert total is not None
    return total


def _samples(layout: Layout, shape: torch.Size, parts: Sequence[Tensor], dtype: torch.dtype):
    """Some samples at a time, unpacked: the first one's number, the last one's and one more, and they.

    In an estimate, not to the end (see `turns`).
    """
    rows = layout.matrix[0] // shape[0] if shape[0] else 0
    if not layout.sliceable or not rows:
        yield 0, shape[0], layout.unpack(parts, dtype).reshape(shape)
        return
    numel = CONVOLUTION_NUMEL.get(parts[0].device.type, shape.numel())
    step = max(1, numel * shape[0] // max(shape.numel(), 1))
    for start in turns(range(0, shape[0], step), parts[0]):
        stop = min(start + step, shape[0])
        x = layout.unpack_rows(parts, start * rows, stop * rows, dtype)
        yield start, stop, x.reshape(stop - start, *shape[1:])
