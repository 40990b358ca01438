"""Of each element, whether it lies between two bounds: one bit; and a gradient that depends on nothing else.

That is all the derivative of ReLU and its kin needs: it has one value between the bounds and another outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from ..kernels import rows as native
from ..kernels import steps as native_steps
from .bits import pack_bits, unpack_bits


@dataclass(frozen=True)
class Steps:
    """A function of two values.

    Attributes:
        low: above this and below `high` it is `inside`.
        high: see `low`; None: there is no such bound.
        inside: its value there. NaN counts as inside: like autograd's ReLU, it lets the gradient through.
        outside: its value elsewhere.
    """

    low: float = 0.0
    high: float | None = None
    inside: float = 1.0
    outside: float = 0.0


def pack_steps(x: Tensor, steps: Steps) -> Tensor:
    """Which elements of `x`, floating point of any shape, lie inside: uint8 `(1, ceil(numel / 8))`."""
    high = nan if steps.high is None else steps.high  # which nothing reaches
    if _is_compiled(x):
        return native_steps.pack_steps(x, steps.low, high)
    return pack_bits(((x <= steps.low) | (x >= high)).logical_not_().reshape(1, -1))


def times_steps(grad: Tensor, bits: Tensor, steps: Steps) -> Tensor:
    """`grad` times the function's value at each element.

    Args:
        grad: floating point, of the shape of what was packed.
        bits: what `pack_steps` returned.
        steps: the function.
    """
    if _is_compiled(grad):
        return native_steps.times_steps(grad, bits, steps.inside, steps.outside)
    mask = unpack_bits(bits, grad.numel()).view(grad.shape)
    inside, outside = (
        0 if value == 0 else grad if value == 1 else grad * value for value in (steps.inside, steps.outside)
    )
    return torch.where(mask, inside, outside)


def _is_compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and native.handles("cpu", x.numel(), 0, x.dtype, x.dtype)
