"""Activation functions: the derivative in few bits, or the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..packing import PackSpec, decode_grid, encode_grid, pack, pack_bits, unpack_bits
from .precision import accumulate_dtype, current_autocast


@dataclass(frozen=True)
class ActivationRule:
    """What is known of an activation function's derivative; without a rule, autograd finds it from the input.

    Attributes:
        derivative: maps the input to the derivative there, elementwise.
        low, high: its least and greatest value.
        steps: for a derivative with just the two values `low` and 1: maps the input to the bool mask of 1. One bit an
            element then holds it exactly.
    """

    derivative: Callable[[Tensor], Tensor]
    low: float
    high: float
    steps: Callable[[Tensor], Tensor] | None = None

    def grid(self, bits: int) -> tuple[float, float]:
        """Least level and step of the finest even grid that spans the derivative's range in `2 ** bits` levels.

        The step divides 1, so that 0 and 1, where most activation functions saturate, are levels and come out exact.
        """
        per_unit = max(1, math.ceil(2**bits / (self.high - self.low)))
        while round(self.high * per_unit) - round(self.low * per_unit) >= 2**bits and per_unit > 1:
            per_unit -= 1
        return round(self.low * per_unit) / per_unit, 1 / per_unit


def activation(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    rule: ActivationRule | None,
    bits: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """An elementwise activation function.

    Args:
        x: float, any shape.
        forward: the activation function; its result is returned as it is.
        rule: its derivative.
        bits: 2, 3, 4, 8: the derivative in so many bits. 16: the input in half precision (float16 for wider tensors),
            the derivative taken from it in backward. 32: the input as it is. A derivative of two values always takes
            one bit. Without a rule, fewer bits than 16 are read as 16.
        parameters: learnable parameters that `forward` reads. They need autograd, so no rule is used for them.
    """
    return _Activation.apply(x, forward, None if parameters else rule, bits, *parameters)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        rule: ActivationRule | None,
        bits: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.rule, ctx.bits, ctx.function = rule, bits, forward
        rows = (math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else (1, 1)
        if rule is not None and rule.steps is not None:
            stored = pack_bits(rule.steps(x).reshape(rows))
        elif rule is not None and bits <= 8:
            derivative = rule.derivative(x.to(accumulate_dtype(x)))
            stored = encode_grid(derivative.reshape(rows), *rule.grid(bits), bits)
        else:
            packed = pack(x, PackSpec(value_dtype="auto" if bits == 32 else "float16"))
            ctx.layout = packed.layout
            ctx.autocast = current_autocast(x.device.type)
            (stored,) = packed.parts
        ctx.rows = rows
        ctx.save_for_backward(stored, *parameters)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stored, *parameters = ctx.saved_tensors
        rule, bits = ctx.rule, ctx.bits
        if rule is None:
            return _grad_by_autograd(ctx, stored, parameters, grad_output)
        if rule.steps is not None:
            mask = unpack_bits(stored, ctx.rows[1]).reshape(grad_output.shape)
            grad_input = torch.where(mask, grad_output, grad_output * rule.low if rule.low else 0)
        elif bits <= 8:
            derivative = decode_grid(stored, ctx.rows, *rule.grid(bits), bits, grad_output.dtype)
            grad_input = grad_output * derivative.reshape(grad_output.shape)
        else:
            x = ctx.layout.unpack((stored,), accumulate_dtype(grad_output))
            grad_input = (grad_output * rule.derivative(x)).to(grad_output.dtype)
        return grad_input, None, None, None


def _grad_by_autograd(
    ctx: FunctionCtx, stored: Tensor, parameters: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    x = ctx.layout.unpack((stored,)).detach().requires_grad_()
    with torch.enable_grad(), ctx.autocast:
        output = ctx.function(x)
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
    grad_input = next(grads)
    return grad_input, None, None, None, *(next(grads) if p.requires_grad else None for p in parameters)


def _unit(x: Tensor) -> Tensor:
    """A gradient of ones, without the memory."""
    return torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)


def _gelu(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(_unit(x), x, approximate="none")


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(_unit(x), x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    # d/dx x s(1.702 x) is silu' at 1.702 x.
    return _silu(1.702 * x)


def _silu(x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(_unit(x), x)


def _mish(x: Tensor) -> Tensor:
    return torch.ops.aten.mish_backward(_unit(x), x)


def _hardswish(x: Tensor) -> Tensor:
    return torch.ops.aten.hardswish_backward(_unit(x), x)


def _tanh(x: Tensor) -> Tensor:
    return 1 - x.tanh().square_()


def _sigmoid(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 - s)


def _positive(x: Tensor) -> Tensor:
    # Not x > 0: like autograd, a NaN lets the gradient through.
    return (x <= 0).logical_not_()


def _inside_six(x: Tensor) -> Tensor:
    return ((x <= 0) | (x >= 6)).logical_not_()


# Ranges: extrema of the derivative, found numerically to six digits.
GELU = ActivationRule(_gelu, -0.128904, 1.128904)
GELU_TANH = ActivationRule(_gelu_tanh, -0.128993, 1.128993)
QUICK_GELU = ActivationRule(_quick_gelu, -0.099839, 1.099839)
SILU = ActivationRule(_silu, -0.099839, 1.099839)
MISH = ActivationRule(_mish, -0.112526, 1.088498)
HARDSWISH = ActivationRule(_hardswish, -0.5, 1.5)
TANH = ActivationRule(_tanh, 0.0, 1.0)
SIGMOID = ActivationRule(_sigmoid, 0.0, 0.25)
RELU = ActivationRule(lambda x: _positive(x).to(x.dtype), 0.0, 1.0, steps=_positive)
RELU6 = ActivationRule(lambda x: _inside_six(x).to(x.dtype), 0.0, 1.0, steps=_inside_six)


def leaky_relu(negative_slope: float) -> ActivationRule:
    """The rule of leaky ReLU with this slope below zero (at most 1)."""
    return ActivationRule(
        lambda x: torch.where(x > 0, 1.0, negative_slope).to(x.dtype), negative_slope, 1.0, steps=lambda x: x > 0
    )
