"""Activation functions: the input in few bits, from which both derivative and output are restored; or the input itself.

For few bits, the real line is divided into cells (see `packing.Cells`), and the derivative and the output are taken for
their means over the cell. The cells are those for which both come out best, in the mean over inputs as pretrained
transformers show them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..compat import hooks_off
from ..packing import Cells, Packed, PackSpec, Steps, encode_cells, pack, pack_steps, times_steps
from ..packing.cells import FINE
from .differentiation import once_differentiable, restored, saved_parts, twice_differentiable
from .layouts import CellLayout, ChannelAffineLayout, RectifiedLayout
from .precision import current_autocast
from .sharing import note_origin, origin_of

# Inputs of GELU, on the pretrained MiniLM-L6 and ViT-S: means of -0.2 to -1.5 and deviations of 0.9 to 2 by layer.
INPUT_MEAN, INPUT_DEVIATION = -0.5, 1.25

# How much an error of the derivative counts against one of the output, each relative to its variance. The first is
# carried into all layers below, the second stays in one weight gradient. Gradient fidelity of 3 bits on MiniLM-L6 and
# ViT-S: 0.964 and 0.956 at a half, 0.967 and 0.955 at one, 0.973 and 0.959 at two.
DERIVATIVE_WEIGHT = 2.0


@dataclass(frozen=True)
class ActivationRule:
    """What is known of an activation function; without a rule, autograd finds the derivative from the input.

    Attributes:
        value: the function.
        reach: its derivative hardly changes below `-reach` and above `reach`.
        steps: for a derivative of two values. One bit an element then holds it exactly.
        top: where the function is max(x, 0), the most that it becomes (infinite for ReLU); None for any other.
        derivative_of_output: the derivative, from the function's output, where autograd saves that and not the input.
    """

    value: Callable[[Tensor], Tensor]
    reach: float = 4.0
    steps: Steps | None = None
    top: float | None = None
    derivative_of_output: Callable[[Tensor], Tensor] | None = None


@cache
def cell_tables(rule: ActivationRule, bits: int) -> tuple[Cells, tuple[float, ...], tuple[float, ...]]:
    """The best cells for a function in `bits` bits, and for each the function's derivative and the function itself.

    Minimises the expected squared error of both over all divisions into intervals, by dynamic programming.
    """
    # Differences, not autograd: this may run inside of a forward pass whose saved tensors are counted.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        step = 2 * rule.reach / FINE
        x = (torch.arange(FINE, dtype=torch.float64) + 0.5) * step - rule.reach
        value = rule.value(x)
        derivative = (rule.value(x + step / 2) - rule.value(x - step / 2)) / step
        weight = torch.exp(-0.5 * ((x - INPUT_MEAN) / INPUT_DEVIATION) ** 2)
        weight /= weight.sum()
        starts = list(range(FINE)) if bits == 8 else _best_intervals(weight, value, derivative, 2**bits)

        def means(f: Tensor) -> tuple[float, ...]:
            bounds = itertools.pairwise([*starts, FINE])
            return tuple(((weight * f)[i:j].sum() / weight[i:j].sum()).item() for i, j in bounds)

        return Cells(bits, rule.reach, tuple(starts)), means(derivative), means(value)


def _best_intervals(weight: Tensor, value: Tensor, derivative: Tensor, count: int) -> list[int]:
    """Where each of the `count` intervals begins over which `value` and `derivative` vary least in sum."""
    n = len(weight)
    total = _prefix_sums(weight)
    cost = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for f, importance in ((value, 1.0), (derivative, DERIVATIVE_WEIGHT)):
        first, second = _prefix_sums(weight * f), _prefix_sums(weight * f * f)
        sums = first[None] - first[:, None]
        variation = second[None] - second[:, None] - sums**2 / (total[None] - total[:, None]).clamp(min=1e-300)
        cost += importance * variation / (second[-1] - first[-1] ** 2)
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).tril(), torch.inf)
    best, origins = cost[0], []
    for _ in range(count - 1):
        best, origin = (best[:, None] + cost).min(0)
        origins.append(origin)
    starts, end = [], n
    for origin in reversed(origins):
        end = int(origin[end])
        starts.append(end)
    return [0, *reversed(starts)]


def _prefix_sums(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def activation(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    rule: ActivationRule | None,
    bits: int,
    parameters: Sequence[Tensor] = (),
    inplace: bool = False,
) -> Tensor:
    """An elementwise activation function.

    Args:
        x: float, any shape.
        forward: the activation function; its result is returned as it is.
        rule: what is known of it.
        bits: 2, 3, 4, 8: the input in so many bits. 16: the input in half precision (float16 for wider tensors). 32:
            the input as it is, or the output where autograd keeps that. A derivative of two values always takes one
            bit. Without a rule, fewer bits than 16 are read as 16.
        parameters: learnable parameters that `forward` reads. They need autograd, so no rule is used for them.
        inplace: `forward` writes its result to `x`, and returns that.
    """
    rule = None if parameters else rule
    if rule is None or rule.steps is not None or bits > 8:
        origin = origin_of(x)  # before `x` may be written to
        y = _Activation.apply(x, forward, rule, bits, inplace, *parameters)
        if rule is not None and rule.top is not None and origin and isinstance(origin.layout, ChannelAffineLayout):
            note_origin(y, Packed(RectifiedLayout(origin.layout, rule.top), origin.parts))
        return y
    y, codes = _CodedActivation.apply(x, forward, rule, bits, inplace)
    cells, _, values = cell_tables(rule, bits)
    note_origin(y, Packed(CellLayout(y.shape, y.dtype, _columns(y), cells, values), (codes,)))
    return y


def _columns(x: Tensor) -> int:
    """Elements in a row of codes: what convolutions read together of feature maps, and linear layers of tokens."""
    return x.shape[2:].numel() if x.dim() > 3 else x.shape[-1] if x.dim() else 1


class _CodedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        rule: ActivationRule,
        bits: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        cells, derivatives, _ = cell_tables(rule, bits)
        ctx.layout = CellLayout(x.shape, x.dtype, _columns(x), cells, derivatives)
        codes = encode_cells(x.detach().reshape(ctx.layout.matrix), cells)
        ctx.save_for_backward(codes)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        return forward(x), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor | None, _codes: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        grad_input = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
        into, grad_rows = grad_input.view(ctx.layout.matrix), grad_output.reshape(ctx.layout.matrix)
        for start, stop, derivative in ctx.layout.slices(ctx.saved_tensors, grad_output.dtype):
            torch.mul(grad_rows[start:stop], derivative, out=into[start:stop])
        return grad_input, None, None, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        rule: ActivationRule | None,
        bits: int,
        inplace: bool,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.rule, ctx.inplace = rule, inplace
        ctx.function = forward if rule is None else rule.value
        if inplace:
            ctx.mark_dirty(x)
        if rule is not None and rule.steps is not None:
            ctx.save_for_backward(pack_steps(x, rule.steps))
            return forward(x)
        if bits == 32 and rule is not None and rule.derivative_of_output is not None:
            y = forward(x)
            ctx.layout = None
            ctx.save_for_backward(y)
            return y
        packed = pack(x, PackSpec(value_dtype="auto" if bits == 32 else "float16"))
        ctx.layout = packed.layout
        ctx.autocast = current_autocast(x.device.type)
        stored = saved_parts(x, packed)
        if inplace and ctx.layout.whole:  # what is stored is `x` itself
            stored = (x.clone(),)
        ctx.save_for_backward(*stored, *parameters)
        return forward(x)

    @staticmethod
    @twice_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stored, *parameters = ctx.saved_tensors
        others = (None,) * 4
        if ctx.rule is not None and ctx.rule.steps is not None:
            return _times_steps(grad_output, stored, ctx.rule.steps), *others
        if ctx.layout is None:
            return grad_output * ctx.rule.derivative_of_output(stored), *others
        again = torch.is_grad_enabled()
        x = restored(ctx.layout, (stored,)) if again else ctx.layout.unpack((stored,)).detach()
        x = x.view_as(x) if x.requires_grad else x.requires_grad_()
        with torch.enable_grad(), ctx.autocast:
            # A function that works in place would write to a leaf, and to what is stored.
            output = ctx.function(x.clone() if ctx.inplace and ctx.rule is None else x)
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        with hooks_off(parameters):
            grads = torch.autograd.grad(output, wanted, grad_output, create_graph=again, allow_unused=True)
        grads = iter(grads)
        return next(grads), *others, *(next(grads) if p.requires_grad else None for p in parameters)


def _times_steps(grad_output: Tensor, bits: Tensor, steps: Steps) -> Tensor:
    if not torch.is_grad_enabled():
        return times_steps(grad_output, bits, steps)
    with torch.no_grad():
        derivative = times_steps(torch.ones_like(grad_output), bits, steps)
    return grad_output * derivative


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


GELU = ActivationRule(F.gelu)
GELU_TANH = ActivationRule(partial(F.gelu, approximate="tanh"))
QUICK_GELU = ActivationRule(_quick_gelu)
SILU = ActivationRule(F.silu, reach=8.0)
MISH = ActivationRule(F.mish, reach=8.0)
HARDSWISH = ActivationRule(F.hardswish)
# torch's gradient is rounded to float32, in double precision as well.
_SIXTH = torch.tensor(1 / 6).item()
HARDSIGMOID = ActivationRule(F.hardsigmoid, steps=Steps(-3.0, 3.0, inside=_SIXTH))
TANH = ActivationRule(torch.tanh, derivative_of_output=lambda y: 1 - y * y)
SIGMOID = ActivationRule(torch.sigmoid, reach=8.0, derivative_of_output=lambda y: y * (1 - y))
RELU = ActivationRule(F.relu, steps=Steps(), top=inf)
RELU6 = ActivationRule(F.relu6, steps=Steps(high=6.0), top=6.0)


def leaky_relu(negative_slope: float) -> ActivationRule:
    """The rule of leaky ReLU with this slope below zero (at most 1)."""
    return ActivationRule(partial(F.leaky_relu, negative_slope=negative_slope), steps=Steps(outside=negative_slope))
