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
from transformers import PreTrainedModel

from ..compat import tree_leaves
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
    group_norm,
    layer_norm,
    linear,
    max_pool2d,
    product,
    rms_norm,
    scaling,
    zero_pad,
)
from ..functional.activation import (
    GELU,
    GELU_TANH,
    HARDSIGMOID,
    HARDSWISH,
    MISH,
    RELU,
    RELU6,
    SIGMOID,
    SILU,
    TANH,
    leaky_relu,
)
from ..functional.interpolated_cross_entropy import MODES
from ..functional.layouts import ActivatedLayout
from ..functional.scaling import rows_of_scaling
from ..functional.sharing import origin_of
from .activation import note_multiplied
from .base import RazorModule, activation_bits, input_spec, linear_spec, map_norm_spec, norm_spec, product_spec
from .batch_norm import batch_norm_spec, has_statistics
from .dropout import packed_dropout
from .own_calls import Call
from .resized_logits import LazyResizedLogits

# Losses and caps of logits are made of these, in the model's own code and in modules. They are no place for 4 bits.
_PROBABILITIES = (SIGMOID, TANH)


def _activation(
    function: Callable[..., Tensor], rule: Callable[..., ActivationRule], always_inplace: bool = False
) -> Callable[..., Any]:
    parameters = inspect.signature(rule).parameters

    def call(module: RazorModule, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        others = {**dict(zip(parameters, args, strict=False)), **kwargs}
        inplace = always_inplace or others.get("inplace", False)
        unknown = len(args) > len(parameters) or not others.keys() <= parameters.keys()
        if unknown or not module.packs(input) or (inplace and not module.works_in_place(input)):
            return NotImplemented
        known, bits = rule(**others), activation_bits(module.razor_config, input)
        if known in _PROBABILITIES:
            if isinstance(module, PreTrainedModel) or module.is_model:
                return NotImplemented
            bits = max(bits, 8)
        return activation(input, lambda x: function(x, **others), known, bits, inplace=inplace)

    return call


def _gelu(approximate: str = "none") -> ActivationRule:
    return GELU if approximate == "none" else GELU_TANH


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> ActivationRule:
    return leaky_relu(negative_slope)


def _rule(rule: ActivationRule) -> Callable[..., ActivationRule]:
    return lambda inplace=False: rule


def _activations(names: str, rule: Callable[..., ActivationRule]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Functions of these names, as torch has them: for themselves, for neural networks, and as methods."""
    owners = (F, torch, Tensor)
    functions = {getattr(owner, name): name for owner in owners for name in names.split() if hasattr(owner, name)}
    return {function: _activation(function, rule, name.endswith("_")) for function, name in functions.items()}


def _linear(module: RazorModule, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not module.packs(input) or not module.razor_active(weight) or weight.dim() != 2:
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
        if input.dim() != weight.dim() or not module.packs(input, weight):
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
    if not module.packs(input, weight):
        return NotImplemented
    config = module.razor_config
    return layer_norm(input, normalized_shape, weight, bias, eps, norm_spec(config), stores=config.norm)


def _rms_norm(
    module: RazorModule,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if len(normalized_shape) != 1 or input.shape[-1:] != tuple(normalized_shape) or not module.packs(input, weight):
        return NotImplemented
    config = module.razor_config
    return rms_norm(input, weight, eps, norm_spec(config), stores=config.norm)


def _group_norm(
    module: RazorModule,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    # Of one value torch refuses to take statistics.
    if input.dim() < 3 or input.numel() == num_groups or not module.packs(input, weight):
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
    if missing or not has_statistics(input) or not module.packs(input, weight, bias):
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
    if return_indices or window.places > Window.MOST_PLACES or not module.packs(input):
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
    if not module.packs(input):
        return NotImplemented
    averaging = Averaging.of(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return average_pool2d(input, averaging)


def _adaptive_average_pool2d(module: RazorModule, input: Tensor, output_size: int | Sequence[int | None]) -> Any:
    if not module.packs(input):
        return NotImplemented
    return adaptive_average_pool2d(input, output_size)


def _pad(
    module: RazorModule, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    spatial = isinstance(input, Tensor) and input.dim() > 2 and len(pad) <= 2 * (input.dim() - 2)
    if mode != "constant" or value or not spatial or not module.packs(input):
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
    *,
    inputs: Any,
) -> Any:
    """The logits of a model that resizes them before its loss: not before they are needed.

    They get the size of labels or of images, which are what the model is called with, and no gradient goes through.
    """
    classes = isinstance(input, Tensor) and input.dim() == 4 and input.shape[1] > 1
    if size is None or mode not in MODES or antialias or not classes or not module.packs(input):
        return NotImplemented
    height, width = (size, size) if isinstance(size, int) else size
    if height * width <= input.shape[2:].numel():  # the gradient of the logits would be no smaller
        return NotImplemented
    given = (x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 2 and not x.requires_grad)
    if (height, width) not in (tuple(x.shape[-2:]) for x in given):
        return NotImplemented
    return LazyResizedLogits(input, Resizing((height, width), mode, align_corners))


def _gated(module: RazorModule, input: Any, other: Any, *, out: Tensor | None = None) -> Any:
    """A product of which a factor can be restored from what an activation function saves."""
    x, y = input, other
    if not _are_tensors(x, y) or out is not None or x.shape != y.shape or x.dtype != y.dtype:
        return NotImplemented
    # Dense, a factor without a gradient, such as a mask, is all that is saved.
    if not (x.requires_grad and y.requires_grad and module.packs(x, y)):
        return NotImplemented
    origins = [origin.layout for factor in (x, y) if (origin := origin_of(factor)) is not None]
    if not any(layout.coarse or isinstance(layout, ActivatedLayout) for layout in origins):
        return NotImplemented
    for factor in (x, y):
        note_multiplied(factor)
    return product(x, y, product_spec(module.razor_config))


def _scaled(module: RazorModule, input: Any, other: Any, *, out: Tensor | None = None) -> Any:
    """A tensor times one number for each of its columns or rows."""
    if not _are_tensors(input, other) or out is not None or input.shape == other.shape:
        return NotImplemented
    for factor, scale in ((input, other), (other, input)):
        # Only then would the other factor be saved for it.
        rows = rows_of_scaling(factor, scale) if scale.requires_grad else None
        if rows is not None and module.packs(factor, scale):
            return scaling(factor, scale, input_spec(module.razor_config, rows))
    return NotImplemented


def _are_tensors(*values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)


_KINDS: dict[str, dict[Callable[..., Any], Callable[..., Any]]] = {
    "dropout": {F.dropout: packed_dropout},
    "activation": {
        **_activations("relu relu_", _rule(RELU)),
        **_activations("relu6", _rule(RELU6)),
        **_activations("leaky_relu leaky_relu_", _leaky_relu),
        **_activations("gelu", _gelu),
        **_activations("silu", _rule(SILU)),
        **_activations("mish", _rule(MISH)),
        **_activations("hardswish", _rule(HARDSWISH)),
        **_activations("hardsigmoid", _rule(HARDSIGMOID)),
    },
    "linear": {F.linear: _linear},
    "convolution": {F.conv1d: _convolution(1), F.conv2d: _convolution(2), F.conv3d: _convolution(3)},
    "norm": {
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        F.group_norm: _group_norm,
        F.batch_norm: _batch_norm,
    },
    "pooling": {
        F.max_pool2d: _max_pool2d,
        F.avg_pool2d: _average_pool2d,
        F.adaptive_avg_pool2d: _adaptive_average_pool2d,
    },
}

_GATES = {**_activations("sigmoid", _rule(SIGMOID)), **_activations("tanh", _rule(TANH))}

CALLS: dict[Callable[..., Any], tuple[Call, ...]] = {
    **{function: (Call(kind, call),) for kind, calls in _KINDS.items() for function, call in calls.items()},
    **{function: (Call("activation", call, common=True),) for function, call in _GATES.items()},
    F.pad: (Call("padding", _pad, common=True),),  # labels, in losses
    F.interpolate: (Call("logits", _interpolate, common=True, sees_inputs=True),),
    **dict.fromkeys(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply),
        (Call("gate", _gated, common=True), Call("scale", _scaled, common=True)),
    ),
}
