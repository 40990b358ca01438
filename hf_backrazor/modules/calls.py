"""Functions of torch that a module's own code calls, where another module would have an operator for them.

`CALLS` says for each what takes its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_traced
from ..functional import (
    ActivationRule,
    Averaging,
    Geometry,
    Resizing,
    Window,
    activation,
    adaptive_average_pool2d,
    average_pool2d,
    batch_norm,
    convolution,
    convolution_same,
    dropout,
    group_norm,
    layer_norm,
    linear,
    max_pool2d,
    product,
    scaling,
    zero_pad,
)
from ..functional.activation import GELU, GELU_TANH, HARDSIGMOID, HARDSWISH, MISH, RELU, RELU6, SILU, leaky_relu
from ..functional.interpolated_cross_entropy import MODES
from ..functional.layouts import ActivatedLayout
from ..functional.scaling import rows_of_scaling
from ..functional.sharing import origin_of
from .base import RazorModule, activation_bits, input_spec, linear_spec, map_norm_spec, norm_spec, product_spec
from .batch_norm import batch_norm_spec, has_statistics
from .resized_logits import LazyResizedLogits, resizes_logits


def _saves(module: RazorModule, x: Any, *trained: Any) -> bool:
    """Whether `x` is a tensor worth packing, in a call with a gradient for one of the tensors."""
    tensors = [t for t in (x, *trained) if isinstance(t, Tensor)]
    return isinstance(x, Tensor) and module.razor_active(*tensors) and module.worth_packing(x)


def _dropout(module: RazorModule, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not (training and 0 < p < 1 and _saves(module, input)) or (inplace and not module.works_in_place(input)):
        return NotImplemented
    return dropout(input, p, inplace)


def _activation(function: Callable[..., Tensor], rule: Callable[..., ActivationRule]) -> Callable[..., Any]:
    parameters = inspect.signature(rule).parameters

    def call(module: RazorModule, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        others = {**dict(zip(parameters, args, strict=False)), **kwargs}
        inplace = others.get("inplace", False)
        if not _saves(module, input) or (inplace and not module.works_in_place(input)):
            return NotImplemented
        bits = activation_bits(module.razor_config, input)
        return activation(input, lambda x: function(x, **others), rule(**others), bits, inplace=inplace)

    return call


def _gelu(approximate: str = "none") -> ActivationRule:
    return GELU if approximate == "none" else GELU_TANH


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> ActivationRule:
    return leaky_relu(negative_slope)


def _rule(rule: ActivationRule) -> Callable[..., ActivationRule]:
    return lambda inplace=False: rule


def _linear(module: RazorModule, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _saves(module, input) or not module.razor_active(weight) or weight.dim() != 2:
        return NotImplemented
    config = module.razor_config
    return linear(input, weight, bias, linear_spec(config, input), weight_gradient=config.weight_gradient)


def _convolution(dimensions: int) -> Callable:
    function = getattr(F, f"conv{dimensions}d")

    def call(
        module: RazorModule,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Literal["same", "valid"] | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:
        if input.dim() != weight.dim() or not _saves(module, input, weight):
            return NotImplemented
        spec = input_spec(module.razor_config, dimensions)
        if padding == "same":
            return convolution_same(input, weight, bias, stride, dilation, groups, spec)
        geometry = Geometry.of(weight, stride, padding, dilation, groups)
        forward = partial(function, weight=weight, bias=bias, stride=stride, padding=padding)
        return convolution(input, weight, bias, geometry, partial(forward, dilation=dilation, groups=groups), spec)

    return call


def _layer_norm(
    module: RazorModule,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not _saves(module, input, weight):
        return NotImplemented
    config = module.razor_config
    return layer_norm(input, normalized_shape, weight, bias, eps, norm_spec(config), stores=config.norm)


def _group_norm(
    module: RazorModule,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    # Of one value torch refuses to take statistics.
    if input.dim() < 3 or input.numel() == num_groups or not _saves(module, input, weight):
        return NotImplemented
    config = module.razor_config
    spec = map_norm_spec(config, input.dim() - 2)
    return group_norm(input, num_groups, weight, bias, eps, spec, stores=config.norm)


def _batch_norm(
    module: RazorModule,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    # With fixed statistics, missing ones are for torch to refuse.
    missing = not training and (running_mean is None or running_var is None)
    if missing or not has_statistics(input) or not _saves(module, input, weight, bias):
        return NotImplemented
    config = module.razor_config
    spec = batch_norm_spec(config, input)
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, spec, stores=config.norm)


def _max_pool2d(
    module: RazorModule,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    window = Window.of(kernel_size, stride, padding, dilation, ceil_mode)
    if return_indices or window.places > Window.MOST_PLACES or not _saves(module, input):
        return NotImplemented
    return max_pool2d(input, window)


def _average_pool2d(
    module: RazorModule,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if not _saves(module, input):
        return NotImplemented
    averaging = Averaging.of(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return average_pool2d(input, averaging)


def _adaptive_average_pool2d(module: RazorModule, input: Tensor, output_size: int | Sequence[int | None]) -> Any:
    if not _saves(module, input):
        return NotImplemented
    return adaptive_average_pool2d(input, output_size)


def _pad(
    module: RazorModule, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    spatial = isinstance(input, Tensor) and input.dim() > 2 and len(pad) <= 2 * (input.dim() - 2)
    if mode != "constant" or value or not spatial or not _saves(module, input):
        return NotImplemented
    return zero_pad(input, pad)


def _interpolate(
    module: RazorModule,
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """The logits of a model that resizes them before its loss: not before they are needed."""
    wanted = resizes_logits(module) and mode in MODES and not antialias
    # A graph of the compiler holds no lazy tensors.
    if not wanted or size is None or is_traced() or not _saves(module, input) or input.dim() != 4:
        return NotImplemented
    height, width = (size, size) if isinstance(size, int) else size
    if height * width <= input.shape[2:].numel():  # the gradient of the logits would be no smaller
        return NotImplemented
    return LazyResizedLogits(input, Resizing((height, width), mode, align_corners))


def _multiply(module: RazorModule, x: Any, y: Any) -> Any:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return NotImplemented
    if x.shape == y.shape:
        return _gated(module, x, y)
    for factor, scale in ((x, y), (y, x)):
        # Only then would the other factor be saved for it.
        rows = rows_of_scaling(factor, scale) if scale.requires_grad else None
        if rows is not None and _saves(module, factor, scale):
            return scaling(factor, scale, input_spec(module.razor_config, rows))
    return NotImplemented


def _gated(module: RazorModule, x: Tensor, y: Tensor) -> Any:
    """A product of which a factor can be restored from what an activation function saves."""
    if x.dtype != y.dtype or not _saves(module, x, y):
        return NotImplemented
    origins = [origin.layout for factor in (x, y) if (origin := origin_of(factor)) is not None]
    if not any(layout.coarse or isinstance(layout, ActivatedLayout) for layout in origins):
        return NotImplemented
    return product(x, y, product_spec(module.razor_config))


CALLS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _dropout,
    F.relu: _activation(F.relu, _rule(RELU)),
    torch.relu: _activation(torch.relu, lambda: RELU),
    F.relu6: _activation(F.relu6, _rule(RELU6)),
    F.leaky_relu: _activation(F.leaky_relu, _leaky_relu),
    F.gelu: _activation(F.gelu, _gelu),
    F.silu: _activation(F.silu, _rule(SILU)),
    F.mish: _activation(F.mish, _rule(MISH)),
    F.hardswish: _activation(F.hardswish, _rule(HARDSWISH)),
    F.hardsigmoid: _activation(F.hardsigmoid, _rule(HARDSIGMOID)),
    F.linear: _linear,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _average_pool2d,
    F.adaptive_avg_pool2d: _adaptive_average_pool2d,
    F.pad: _pad,
    F.interpolate: _interpolate,
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply), _multiply),
}
