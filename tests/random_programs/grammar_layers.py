"""Layers: for each, code that constructs one that fits `x`, or None.

What does not fit is found by running it (see `generate.py`), so these need not be careful.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from torch import Tensor
from transformers.activations import ACT2FN

Maker = Callable[[Random, Tensor], str | None]

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)

ACTIVATIONS = [
    *(f'ACT2FN["{name}"]' for name in ACT2FN if name != "linear"),
    *("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU6()", "nn.ReLU6(inplace=True)", "nn.GELU()", "nn.SiLU()"),
    *("nn.GELU(approximate='tanh')", "nn.SiLU(inplace=True)", "nn.Mish()", "nn.Mish(inplace=True)", "nn.Hardswish()"),
    *("nn.Hardswish(inplace=True)", "nn.Hardsigmoid()", "nn.Hardsigmoid(inplace=True)", "nn.Tanh()", "nn.Sigmoid()"),
    *("nn.LeakyReLU(0.1)", "nn.LeakyReLU(0.2, inplace=True)", "nn.LeakyReLU(-0.3)", "nn.LeakyReLU(1.5)", "nn.ELU()"),
    *("nn.ELU(0.7, inplace=True)", "nn.SELU()", "nn.SELU(inplace=True)", "nn.CELU(0.5)", "nn.CELU(inplace=True)"),
    *("nn.Softplus()", "nn.Softplus(2.0)", "nn.PReLU()", "nn.Softsign()", "nn.Hardtanh()", "nn.Hardtanh(inplace=True)"),
    *("nn.LogSigmoid()", "nn.Tanhshrink()", "nn.Softmax(-1)", "nn.Threshold(0.1, 0.2)", "nn.GLU(-1)"),
]


def _linear(rng: Random, x: Tensor) -> str:
    return f"nn.Linear({x.shape[-1]}, {rng.choice(WIDTHS)}, bias={rng.random() < 0.7})"


def _conv1d_of_transformers(rng: Random, x: Tensor) -> str:
    return f"Conv1D({rng.choice(WIDTHS)}, {x.shape[-1]})"


def _layer_norm(rng: Random, x: Tensor) -> str:
    shape = tuple(x.shape[-rng.choice((1, 1, 1, 2)) :])
    options = rng.choice(("", "", "", ", bias=False", ", elementwise_affine=False", ", eps=0.1"))
    return f"nn.LayerNorm({shape}{options})"


def _rms_norm(rng: Random, x: Tensor) -> str:
    width = x.shape[-1]
    return rng.choice(
        (
            f"nn.RMSNorm({width})",
            f"nn.RMSNorm({width}, elementwise_affine=False)",
            f"nn.RMSNorm({tuple(x.shape[-2:])})",
            f"LlamaRMSNorm({width})",
            f"nn.RMSNorm({width}, eps=0.1)",
        )
    )


def _batch_norm(rng: Random, x: Tensor) -> str | None:
    kind = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}.get(x.dim())
    options = rng.choice(("", "", "", ", affine=False", ", track_running_stats=False", ", momentum=None", ", eps=0.1"))
    return kind and f"nn.BatchNorm{kind}({x.shape[1]}{options})"


def _group_norm(rng: Random, x: Tensor) -> str | None:
    if x.dim() < 2:
        return None
    channels = x.shape[1]
    groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0] or [1])
    return f"nn.GroupNorm({groups}, {channels}{rng.choice(('', '', ', affine=False'))})"


def _instance_norm(rng: Random, x: Tensor) -> str | None:
    kind = {3: "1d", 4: "2d", 5: "3d"}.get(x.dim())
    options = rng.choice(("", ", affine=True", ", affine=True, track_running_stats=True", ", track_running_stats=True"))
    return kind and f"nn.InstanceNorm{kind}({x.shape[1]}{options})"


def _sizes(rng: Random, dims: int, choices: tuple[int, ...]) -> str:
    if rng.random() < 0.6:
        return str(rng.choice(choices))
    return str(tuple(rng.choice(choices) for _ in range(dims)))


def _convolution(rng: Random, x: Tensor) -> str | None:
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        return None
    channels = x.shape[1]
    groups = rng.choice([1, 1, 1, *(g for g in range(2, channels + 1) if channels % g == 0)])
    out = groups * rng.choice((1, 1, 2, 3, 4))
    options = [f"groups={groups}"] if groups > 1 else []
    if rng.random() < 0.3:
        options.append("bias=False")
    if rng.random() < 0.4:
        options.append(f"dilation={_sizes(rng, dims, (1, 2))}")
    if rng.random() < 0.25:
        options.append(f'padding="{rng.choice(("same", "same", "valid"))}"')
    else:
        options += [f"stride={_sizes(rng, dims, (1, 2, 3))}"] if rng.random() < 0.4 else []
        options += [f"padding={_sizes(rng, dims, (0, 1, 2))}"] if rng.random() < 0.6 else []
    if rng.random() < 0.15:
        options.append(f'padding_mode="{rng.choice(("reflect", "replicate", "circular"))}"')
    kernel = _sizes(rng, dims, (1, 2, 3, 4))
    return f"nn.Conv{dims}d({', '.join([str(channels), str(out), kernel, *options])})"


def _transposed_convolution(rng: Random, x: Tensor) -> str | None:
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        return None
    channels = x.shape[1]
    groups = rng.choice([1, 1, *(g for g in range(2, channels + 1) if channels % g == 0)])
    options = [f"groups={groups}"] if groups > 1 else []
    if rng.random() < 0.6:
        options.append(f"stride={_sizes(rng, dims, (1, 2))}")
    if rng.random() < 0.4:
        options.append(f"padding={_sizes(rng, dims, (0, 1))}")
    if rng.random() < 0.3:
        options.append(f"output_padding={_sizes(rng, dims, (0, 1))}")
    if rng.random() < 0.3:
        options.append("dilation=2")
    out = groups * rng.choice((1, 2, 3))
    kernel = _sizes(rng, dims, (1, 2, 3, 4))
    return f"nn.ConvTranspose{dims}d({', '.join([str(channels), str(out), kernel, *options])})"


def _pooling(rng: Random, x: Tensor) -> str | None:
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        return None
    kernel, out = _sizes(rng, dims, (1, 2, 3, 4)), _sizes(rng, dims, (1, 2, 3))
    options = f", stride={_sizes(rng, dims, (1, 2, 3))}" if rng.random() < 0.5 else ""
    options += f", padding={rng.choice((0, 1))}" if rng.random() < 0.4 else ""
    options += ", ceil_mode=True" if rng.random() < 0.2 else ""
    dilation = f", dilation={_sizes(rng, dims, (1, 2))}" if rng.random() < 0.2 else ""
    excluded = ", count_include_pad=False" if rng.random() < 0.2 else ""
    return rng.choice(
        (
            f"nn.MaxPool{dims}d({kernel}{options}{dilation})",
            f"nn.MaxPool{dims}d({kernel}{options}{dilation})",
            f"nn.AvgPool{dims}d({kernel}{options}{excluded})",
            f"nn.AvgPool{dims}d({kernel}{options}{', divisor_override=3' if dims > 1 else ''})",
            f"nn.AdaptiveAvgPool{dims}d({out})",
            f"nn.AdaptiveMaxPool{dims}d({out})",
            "nn.LPPool2d(2, 2)" if dims == 2 else f"nn.AvgPool{dims}d(2)",
        )
    )


def _padding(rng: Random, x: Tensor) -> str | None:
    dims = x.dim() - 2
    if dims not in (1, 2, 3):
        return None
    kind = rng.choice(("ZeroPad", "ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad", "ConstantPad"))
    # Circular padding by less than nothing leaves memory as it was (torch 2.13).
    sides = (0, 1, 2) if kind == "CircularPad" else (0, 1, 2, -1)
    pads = rng.choice((1, tuple(rng.choice(sides) for _ in range(2 * dims))))
    return f"nn.{kind}{dims}d({pads}{', 0.5' if kind == 'ConstantPad' else ''})"


def _dropout(rng: Random, x: Tensor) -> str:
    kind = rng.choice(("Dropout", "Dropout", "Dropout", "Dropout", "Dropout1d", "Dropout2d", "AlphaDropout"))
    p = rng.choice((0.1, 0.3, 0.5, 0.9, 0.0, 1.0))
    return f"nn.{kind}({p}{', inplace=True' if rng.random() < 0.25 else ''})"


def _activation(rng: Random, x: Tensor) -> str:
    if x.dim() > 1 and rng.random() < 0.05:
        return f"nn.PReLU({x.shape[1]})"
    return rng.choice(ACTIVATIONS)


def _upsampling(rng: Random, x: Tensor) -> str | None:
    if x.dim() != 4:
        return None
    return rng.choice(
        ("nn.Upsample(scale_factor=2)", 'nn.Upsample(size=(5, 6), mode="bilinear")', "nn.PixelShuffle(2)")
    )


def _transformer(rng: Random, x: Tensor) -> str | None:
    width = x.shape[-1]
    if x.dim() != 3 or width % 2:
        return None
    kinds = ["Bert", "GPT2"] + (["Llama"] if width % 4 == 0 else [])
    options = rng.choice(("", "", ", dropout=0.2"))
    return f"{rng.choice(kinds)}({width}{options}{rng.choice(('', '', ', attention=' + repr('eager')))})"


def _torch_transformer(rng: Random, x: Tensor) -> str | None:
    if x.dim() != 3 or x.shape[-1] % 2:
        return None
    options = rng.choice(("", ", norm_first=True", ', activation="gelu"'))
    return f"nn.TransformerEncoderLayer({x.shape[-1]}, 2, 6, dropout=0.1, batch_first=True{options})"


def _sequential(rng: Random, x: Tensor) -> str:
    width, hidden = x.shape[-1], rng.choice((4, 6, 8))
    first = rng.choice((f"nn.LayerNorm({width}), ", f"nn.RMSNorm({width}), ", "", ""))
    after = rng.choice(("", "nn.Dropout(0.2), ", f"nn.LayerNorm({hidden}), "))
    return (
        f"nn.Sequential({first}nn.Linear({width}, {hidden}), {_activation(rng, x[..., :1])}, {after}"
        f"nn.Linear({hidden}, {width}))"
    )


def _conv_sequential(rng: Random, x: Tensor) -> str | None:
    if x.dim() != 4:
        return None
    channels, hidden = x.shape[1], rng.choice((2, 3, 4))
    norm = rng.choice((f"nn.BatchNorm2d({hidden})", f"nn.GroupNorm(1, {hidden})", f"nn.InstanceNorm2d({hidden})"))
    after = rng.choice(("nn.MaxPool2d(2), ", "nn.ZeroPad2d(1), ", "nn.Dropout(0.2), ", "", ""))
    kernel = rng.choice(("1", "3, padding=1", "2, padding='same'", "3, stride=2", "(3, 2)"))
    return (
        f"nn.Sequential(nn.Conv2d({channels}, {hidden}, {kernel}), {norm}, {_activation(rng, x)}, {after}"
        f"nn.Conv2d({hidden}, {channels}, {rng.choice(('1', '3, padding=1', '3, padding=1, bias=False'))}))"
    )


# What it is -> the maker and how often it is drawn.
LAYERS: dict[str, tuple[Maker, int]] = {
    "Linear": (_linear, 18),
    "Conv1D": (_conv1d_of_transformers, 4),
    "LayerNorm": (_layer_norm, 8),
    "RMSNorm": (_rms_norm, 6),
    "BatchNorm": (_batch_norm, 8),
    "GroupNorm": (_group_norm, 6),
    "InstanceNorm": (_instance_norm, 4),
    "Conv": (_convolution, 14),
    "ConvTranspose": (_transposed_convolution, 4),
    "pooling": (_pooling, 8),
    "padding": (_padding, 4),
    "Dropout": (_dropout, 6),
    "activation": (_activation, 22),
    "upsampling": (_upsampling, 2),
    "transformer layer": (_transformer, 4),
    "torch transformer layer": (_torch_transformer, 1),
    "Sequential": (_sequential, 5),
    "Sequential of convolutions": (_conv_sequential, 6),
}
