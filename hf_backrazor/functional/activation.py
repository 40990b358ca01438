"""Activation functions: the input in few bits, from which both derivative and output are restored; or the input itself.

For few bits, the real line is divided into cells (see `packing.Cells`), and the derivative and the output are taken for
their means over the cell. The cells are those for which both come out best, in the mean over inputs as pretrained
transformers show them, at the scale of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import inf, pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import unset_fake_temporarily
from ..packing import Cells, CellTable, Packed, PackSpec, Steps, encode_cells, pack, pack_steps, times_steps
from ..packing.cells import FINE
from .differentiation import once_differentiable, replayed_gradients, restored, saved_parts, twice_differentiable
from .layouts import ActivatedLayout, CellLayout, ChannelAffineLayout, RectifiedLayout, gradient_by_rows
from .precision import current_autocast
from .sharing import note_origin, origin_of

# There are cells for inputs of these deviations, half an octave apart, from 2^-16 to 2^8; a row takes those whose mean
# square is nearest.
DEVIATIONS = tuple(1.25 * 2 ** (member / 2) for member in range(-32, 16))

# In deviations: the mean of inputs, and what the cells' steps cover. Inputs of GELU, on the pretrained MiniLM-L6 and
# ViT-S, have means of -0.2 to -1.5 and deviations of 0.9 to 2 by layer; gates of SmolLM2-135M have deviations of 0.3 to
# 1.2 and means of -0.75 to 0.05 deviations. With cells for a mean of 0, the derivative has a sixth more error on MiniLM
# and SmolLM2. Divisions for three ratios of mean and deviation, chosen by row, take 11 and 4 % off the output's error
# in 4 bits, and are thrice as many.
MEAN, REACH = -0.4, 4.0

# Cells begin with every second step. The search takes a quarter of the time, and finds what is as good.
STRIDE = 2

# How much an error of the derivative counts, relative to its mean square, against one of the output, relative to its
# variance. The first is carried into all layers below, the second stays in one weight gradient. Root mean square errors
# in 3 bits, of derivative and output: on MiniLM-L6 0.141 and 0.215 at two, 0.131 and 0.214 at four; on SmolLM2-135M
# 0.099 and 0.153 at two, 0.094 and 0.159 at four.
DERIVATIVE_WEIGHT = 4.0


@dataclass(frozen=True)
class ActivationRule:
    """What is known of an activation function; without a rule, autograd finds the derivative from the input.

    Attributes:
        value: the function.
        reach: its derivative hardly changes below `-reach` and above `reach`. If it is zero there, cells need not
            divide what lies beyond.
        steps: for a derivative of two values. One bit an element then holds it exactly.
        top: where the function is max(x, 0), the most that it becomes (infinite for ReLU); None for any other.
        derivative_of_output: the derivative, from the function's output, where autograd saves that and not the input.
    """

    value: Callable[[Tensor], Tensor]
    reach: float = 4.0
    steps: Steps | None = None
    top: float | None = None
    derivative_of_output: Callable[[Tensor], Tensor] | None = None

    def gradient(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """`grad_output` times the derivative at `x`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.value(x)
        return torch.autograd.grad(y, x, grad_output)[0]


@cache
def cell_tables(rule: ActivationRule, bits: int) -> tuple[Cells, CellTable, CellTable]:
    """The best cells for a function in `bits` bits, and for each the function's derivative and the function itself.

    Each of `DEVIATIONS` has a division of its own: the one into intervals that minimises the expected squared error of
    both, found by dynamic programming.
    """
    # Differences, not autograd: this may run inside of a forward pass whose saved tensors are counted. Or on fake ones.
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        deviation = torch.tensor(DEVIATIONS, dtype=torch.float64).unsqueeze(1)
        mean = MEAN * deviation
        reach = REACH * deviation
        if _is_flat_beyond(rule):
            reach.clamp_(max=rule.reach)
        step = 2 * reach / FINE
        x = (torch.arange(FINE, dtype=torch.float64) + 0.5) * step - reach

        def derivative_at(x: Tensor) -> Tensor:
            return (rule.value(x + step / 2) - rule.value(x - step / 2)) / step

        weight = torch.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * sqrt(2 * pi)) * step
        value, derivative = rule.value(x), derivative_at(x)
        # The outermost steps take all that lies beyond, which is as if it lay at its mean.
        for side, edge in ((-1, 0), (1, FINE - 1)):
            start = (reach - side * mean) / deviation
            beyond = torch.special.ndtr(-start)
            centre = mean + side * deviation * torch.exp(-0.5 * start**2) / sqrt(2 * pi) / beyond
            share = (beyond / (beyond + weight[:, edge : edge + 1])).squeeze(1)
            value[:, edge].lerp_(rule.value(centre).squeeze(1), share)
            derivative[:, edge].lerp_(derivative_at(centre).squeeze(1), share)
            weight[:, edge] += beyond.squeeze(1)
        weight /= weight.sum(1, keepdim=True)
        if bits == 8:
            starts = torch.arange(FINE).expand(len(x), FINE)
        else:
            starts = _best_intervals(weight, value, derivative, 2**bits)
        bounds = deviation[:-1, 0].square() * (1 + MEAN**2) * sqrt(2)
        cells = Cells(bits, bounds.float(), (1 / step[:, 0]).float(), starts.to(torch.uint8).contiguous())
        ends = torch.cat([starts[:, 1:], starts.new_full((len(x), 1), FINE)], 1)

        def sums(f: Tensor) -> Tensor:
            below = _prefix_sums(weight * f)
            return below.gather(1, ends) - below.gather(1, starts)

        total = sums(torch.ones_like(x))
        slopes, values = (CellTable((sums(f) / total).float()) for f in (derivative, value))
        return cells, slopes, values


def _is_flat_beyond(rule: ActivationRule) -> bool:
    """Whether the function hardly changes beyond the rule's reach, which then serves for inputs of any scale."""
    near = torch.tensor([-rule.reach, rule.reach], dtype=torch.float64)
    return bool(((rule.value(2 * near) - rule.value(near)).abs() < 1e-3 * rule.reach).all())


def _best_intervals(weight: Tensor, value: Tensor, derivative: Tensor, count: int) -> Tensor:
    """Where each of the `count` intervals begins over which `value` and `derivative` vary least in sum.

    Args:
        weight, value, derivative: float64 `(members, n)`.

    Returns:
        int64 `(members, count)`, multiples of `STRIDE`.
    """

    def sums(x: Tensor) -> Tensor:
        return _prefix_sums(x)[:, ::STRIDE]

    def over_intervals(sums: Tensor) -> Tensor:  # (members, end, start)
        return sums.unsqueeze(2) - sums.unsqueeze(1)

    cost: Any = 0.0
    total = over_intervals(sums(weight)).clamp_(min=1e-300)
    for f, importance in ((value, 1.0), (derivative, DERIVATIVE_WEIGHT)):
        centred = f - (weight * f).sum(1, keepdim=True)  # for the sake of precision
        variance = (weight * centred**2).sum(1, keepdim=True)
        scale = importance / (variance if f is value else (weight * f**2).sum(1, keepdim=True))
        variation = over_intervals(sums(weight * centred**2 * scale))
        variation -= over_intervals(sums(weight * centred * scale.sqrt())).square_().div_(total)
        cost = variation + cost
    places = cost.shape[1]
    cost.masked_fill_(torch.ones(places, places, dtype=torch.bool).triu(), torch.inf)
    # The least cost of all up to each end, in one interval, in two, ...
    best = [cost[:, :, 0]]
    for _ in range(count - 2):
        best.append((best[-1].unsqueeze(1) + cost).amin(2))
    end = torch.full((len(weight), 1), places - 1)
    starts = []
    for least in reversed(best):
        end = (least + cost.take_along_dim(end.unsqueeze(2), 1).squeeze(1)).argmin(1, keepdim=True)
        starts.append(end)
    return STRIDE * torch.cat([torch.zeros_like(end), *reversed(starts)], 1)


def _prefix_sums(x: Tensor) -> Tensor:
    """Sums of what stands before each place, and of all: `(members, n + 1)`."""
    return F.pad(x.cumsum(1), (1, 0))


def activation(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    rule: ActivationRule | None,
    bits: int,
    parameters: Sequence[Tensor] = (),
    inplace: bool = False,
    spec: PackSpec | None = None,
) -> Tensor:
    """An elementwise activation function.

    Args:
        x: float, any shape.
        forward: the activation function, of `x` and `parameters`; its result is returned as it is.
        rule: what is known of it.
        bits: 2, 3, 4, 8: the input in so many bits. 16: the input in half precision (float16 for wider tensors). 32:
            the input as it is, or the output where autograd keeps that. A derivative of two values always takes one
            bit. Without a rule, fewer bits than 16 are read as 16.
        parameters: learnable parameters. They need autograd, so no rule is used for them.
        inplace: `forward` writes its result to `x`, and returns that.
        spec: how the input is packed where `bits` would have it in cells of the function; None: in cells.
    """
    rule = None if parameters else rule
    if rule is None or rule.steps is not None or bits > 8:
        origin = origin_of(x)  # before `x` may be written to
        y = _Activation.apply(x, forward, rule, bits, inplace, *parameters)
        if rule is not None and rule.top is not None and origin and isinstance(origin.layout, ChannelAffineLayout):
            note_origin(y, Packed(RectifiedLayout(origin.layout, rule.top), origin.parts))
        return y
    if spec is not None:
        packed = pack(x, spec)
        y = _PackedActivation.apply(x, forward, rule, packed, inplace)
        note_origin(y, Packed(ActivatedLayout(packed.layout, rule.value), packed.parts))
        return y
    y, *codes = _CodedActivation.apply(x, forward, rule, bits, inplace)
    cells, _, values = cell_tables(rule, bits)
    note_origin(y, Packed(CellLayout(y.shape, y.dtype, _columns(y), cells, values), tuple(codes)))
    return y


def _columns(x: Tensor) -> int:
    """Elements in a row of codes: what convolutions read together of feature maps, and linear layers of tokens."""
    return x.shape[2:].numel() if x.dim() > 3 else x.shape[-1] if x.dim() else 1


class _CodedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        rule: ActivationRule,
        bits: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        cells, derivatives, _ = cell_tables(rule, bits)
        ctx.layout = CellLayout(x.shape, x.dtype, _columns(x), cells, derivatives)
        codes = encode_cells(x.detach().reshape(ctx.layout.matrix), cells)
        ctx.save_for_backward(*codes)
        ctx.mark_non_differentiable(*codes)
        if inplace:
            ctx.mark_dirty(x)
        return forward(x), *codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_codes: None) -> tuple[Tensor | None, ...]:
        return gradient_by_rows(grad_output, ctx.layout, ctx.saved_tensors), None, None, None, None


class _PackedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        rule: ActivationRule,
        packed: Packed,
        inplace: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.rule = packed.layout, rule
        ctx.save_for_backward(*packed.parts)
        if inplace:
            ctx.mark_dirty(x)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        def write(x: Tensor, grad: Tensor, out: Tensor) -> None:
            out.copy_(ctx.rule.gradient(x, grad))

        return gradient_by_rows(grad_output, ctx.layout, ctx.saved_tensors, write), None, None, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        rule: ActivationRule | None,
        bits: int,
        inplace: bool,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
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
        return forward(x, *parameters)

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stored, *parameters = ctx.saved_tensors
        others = (None,) * 4
        if ctx.rule is not None and ctx.rule.steps is not None:
            return _times_steps(grad_output, stored, ctx.rule.steps), *others
        if ctx.layout is None:
            return grad_output * ctx.rule.derivative_of_output(stored), *others
        needed = ctx.needs_input_grad

        # A function that works in place would write to a leaf, and to what is stored.
        def plain(x: Tensor, *parameters: Tensor) -> Tensor:
            with ctx.autocast:
                return ctx.function(x.clone() if ctx.inplace and ctx.rule is None else x, *parameters)

        if torch.is_grad_enabled():
            x = restored(ctx.layout, (stored,), constant=not needed[0])
            grad_x, *grads = replayed_gradients(plain, (x, *parameters), grad_output)
            return grad_x, *others, *grads
        inputs = [ctx.layout.unpack((stored,)).detach(), *(parameter.detach() for parameter in parameters)]
        for tensor, wanted in zip(inputs, (needed[0], *needed[5:]), strict=True):
            tensor.requires_grad_(wanted)
        with torch.enable_grad():
            output = plain(*inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
        grad_x, *grads = (next(found) if tensor.requires_grad else None for tensor in inputs)
        return grad_x, *others, *grads


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
# torch's gradient is rounded to float32, in double precision as well. On the CPU by name, as this may be imported while
# "meta" is the default device.
_SIXTH = torch.tensor(1 / 6, device="cpu").item()
HARDSIGMOID = ActivationRule(F.hardsigmoid, steps=Steps(-3.0, 3.0, inside=_SIXTH))
TANH = ActivationRule(torch.tanh, derivative_of_output=lambda y: 1 - y * y)
SIGMOID = ActivationRule(torch.sigmoid, reach=8.0, derivative_of_output=lambda y: y * (1 - y))
RELU = ActivationRule(F.relu, steps=Steps(), top=inf)
RELU6 = ActivationRule(F.relu6, steps=Steps(high=6.0), top=6.0)


def leaky_relu(negative_slope: float) -> ActivationRule:
    """The rule of leaky ReLU with this slope below zero (at most 1)."""
    return ActivationRule(partial(F.leaky_relu, negative_slope=negative_slope), steps=Steps(outside=negative_slope))
