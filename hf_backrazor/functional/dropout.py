"""Dropout: one bit an element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.bernoulli import bernoulli_
from ..packing import Packed, pack_bits, unpack_bits
from .differentiation import twice_differentiable
from .layouts import DroppedLayout
from .sharing import note_origin, origin_of


def dropout(x: Tensor, p: float, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout` in training mode, with the mask saved in one bit an element.

    Draws the same numbers from torch's generator as the dense operator and returns the same result. The mask is kept
    rather than drawn again from the generator's state: drawing costs 1 to 7 ns an element on a CPU, unpacking 0.1.

    Args:
        x: float, any shape.
        p: probability of a zero, between 0 and 1 (both excluded).
        inplace: write the result to `x`, and return that.
    """
    origin = origin_of(x)  # before `x` may be written to
    y, bits = _Dropout.apply(x, p, inplace)
    if origin is not None:
        note_origin(y, Packed(DroppedLayout(origin.layout, p), (*origin.parts, bits)))
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if x.device.type == "cpu":
            # The steps of the dense operator there; `native_dropout` rounds differently for some p.
            noise = bernoulli_(torch.empty_like(x), 1 - p).div_(1 - p)
            output, mask = x.mul_(noise) if inplace else x * noise, noise != 0
        else:
            output, mask = torch.native_dropout(x, p, True)
            output = x.copy_(output) if inplace else output
        if inplace:
            ctx.mark_dirty(x)
        ctx.keep_probability = 1 - p
        bits = pack_bits(mask.reshape(1, -1))
        ctx.save_for_backward(bits)
        ctx.mark_non_differentiable(bits)
        return output, bits

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor, _bits: None) -> tuple[Tensor | None, None, None]:
        (bits,) = ctx.saved_tensors
        mask = unpack_bits(bits, grad_output.numel()).view(grad_output.shape)
        return (grad_output * mask).mul_(1 / ctx.keep_probability), None, None
