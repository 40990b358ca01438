"""Operators that a module's own forward applies without a module for them.

Model code calls `torch.nn.functional` directly: dropout in OPT, BART and Whisper, convolutions and norms in BiT,
pooling and activation functions in many a network for images. And it multiplies: a gated MLP (`act(gate) * up`, in
Llama and its kin), a gate of channels (squeeze and excitation), a trained vector (PEFT's DoRA and IA3, layer scale).
The model itself resizes logits before its loss, in dense prediction.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import nn

from ..compat import AnyBatchNorm, AnyConvolution
from ..config import RazorConfig
from .activation import RazorActivation
from .base import RazorModule, describe, forward_source, input_spec, norm_spec, whole_shape
from .calls import CALLS
from .own_calls import OwnCalls
from .resized_logits import resizes_logits

_FUNCTIONAL = r"\b(?:functional|F)\."
# Kind of function -> how its calls are written.
_CALLED = {
    "dropout": re.compile(_FUNCTIONAL + r"dropout\("),
    "activation": re.compile(
        _FUNCTIONAL + r"(?:relu6?|gelu|silu|mish|hardswish|hardsigmoid|leaky_relu)\(|\btorch\.relu\("
    ),
    "linear": re.compile(_FUNCTIONAL + r"linear\("),
    "convolution": re.compile(_FUNCTIONAL + r"conv[123]d\(|\b_conv_forward\("),
    "norm": re.compile(_FUNCTIONAL + r"(?:layer|group|batch)_norm\("),
    "pooling": re.compile(_FUNCTIONAL + r"(?:max|avg|adaptive_avg)_pool2d\("),
    "padding": re.compile(_FUNCTIONAL + r"pad\(|\bapply_tf_padding\("),  # the latter in MobileNets
}
_SUPER = re.compile(r"\bsuper\(\)\.forward\(")
_PRODUCT = re.compile(r"[^*]\*\s*[\w(]|\bmul(?:tiply)?\(")

# Layers whose forward is one call; a subclass with a forward of its own makes it through `super()`.
_LAYERS = {
    nn.LayerNorm: "norm",
    nn.GroupNorm: "norm",
    AnyBatchNorm: "norm",
    nn.Linear: "linear",
    AnyConvolution: "convolution",
}


class RazorInline(RazorModule):
    """A module whose forward calls functions of `torch.nn.functional` that razor has operators for, or multiplies the
    output of an activation function, or multiplies by a vector that it trains, or resizes logits for a loss."""

    kind = "inline"
    runs_own_code = True
    # These are the decoder layers that FSDP and device maps know by the name of their class.
    name_prefix = ""

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if type(module).__module__.startswith("torch.nn."):
            # These have operators of their own, but for a convolution that pads before it calls the function.
            return isinstance(module, AnyConvolution) and module.padding_mode != "zeros"
        return bool(_called(module)) or _multiplies(module) or _scales(module) or resizes_logits(module)

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        super().install(module, config)
        if _multiplies(module):
            for gate in _activations(module):
                gate.razor_gates = True

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: a forward with the plain one's signature, from which Trainer reads what it takes."""

        @functools.wraps(extended.forward)
        def forward(self: RazorInline, *args: Any, **kwargs: Any) -> Any:
            if not (self.training and self.razor_enabled):
                return extended.forward(self, *args, **kwargs)
            with OwnCalls(self, CALLS):
                return extended.forward(self, *args, **kwargs)

        return {"forward": forward}

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        config = self.razor_config
        packed, normed = (describe(spec).removeprefix("razor=") for spec in (input_spec(config), norm_spec(config)))
        details = {
            "dropout": "functional dropout in 1 bit",
            "activation": f"functional activation in {config.activation_bits} bits",
            "linear": f"functional linear, {packed}",
            "convolution": f"functional convolution, {packed}",
            "norm": f"functional norm, {normed} of {config.norm}",
            "pooling": "functional pooling",
            "padding": "padding that is restored",
        }
        what = [details[kind] for kind in _called(self)]
        if _multiplies(self):
            what.append(f"gated product in {config.activation_bits} bits")
        if _scales(self):
            what.append(f"scaled tensor, {packed}")
        if resizes_logits(self):
            what.append("loss in bands, resized logits on demand")
        return "razor=" + ", ".join(what)


class RazorOutermost(RazorInline):
    """The model itself, where its forward is such. The compiler is left it: it would compile nothing otherwise."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's."""
        return super(RazorModule, self).__call__(*args, **kwargs)


def _plain(module: nn.Module) -> type[nn.Module]:
    return module.plain_class if isinstance(module, RazorModule) else type(module)


def _called(module: nn.Module) -> list[str]:
    """Kinds of functions that the forward calls."""
    source = forward_source(_plain(module))
    kinds = [kind for kind, words in _CALLED.items() if words.search(source)]
    if _SUPER.search(source):
        kinds += [kind for layer, kind in _LAYERS.items() if isinstance(module, layer) and kind not in kinds]
    return kinds


def _multiplies(module: nn.Module) -> bool:
    if not _PRODUCT.search(forward_source(_plain(module))):
        return False
    return bool(_activations(module))


def _activations(module: nn.Module) -> list[Any]:
    """The activation functions of a module, or of a sequence in it."""
    inner = [part for child in module.children() if isinstance(child, nn.Sequential) for part in child]
    within = (*module.children(), *inner)
    return [m for m in within if isinstance(m, RazorActivation) or RazorActivation.handles(m)]


def _scales(module: nn.Module) -> bool:
    # PEFT keeps a vector for each adapter in a dictionary. Norms have an operator of their own, or a warning.
    owners = [module, *(child for child in module.children() if isinstance(child, nn.ParameterDict))]
    shapes = [whole_shape(parameter) for owner in owners for parameter in owner.parameters(recurse=False)]
    if not shapes or any(shape.numel() != max(shape, default=0) for shape in shapes):
        return False
    return not type(module).__name__.endswith("Norm") and bool(_PRODUCT.search(forward_source(_plain(module))))
