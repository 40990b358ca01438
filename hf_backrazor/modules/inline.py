"""Operators that a module's own forward applies without a module for them.

These are dropout as a function (`nn.functional.dropout`, in OPT, BART and Whisper), the product of a gated MLP
(`act(gate) * up`, in Llama and its kin), and a product with a trained vector (PEFT's DoRA and IA3, layer scale).
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..functional import dropout, product
from ..functional.scaling import scaling
from ..functional.sharing import origin_of
from .activation import RazorActivation
from .base import RazorModule, describe, forward_source, input_spec, product_spec, whole_shape

_DROPOUT = re.compile(r"\b(?:functional|F)\.dropout\(")
_PRODUCT = re.compile(r"[^*]\*\s*[\w(]|\bmul(?:tiply)?\(")
_MULTIPLICATIONS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply)


class RazorInline(RazorModule):
    """A module whose forward calls `nn.functional.dropout`, or multiplies the output of its activation function, or
    multiplies by a vector that it trains."""

    kind = "inline"
    # These are the decoder layers that FSDP and device maps know by the name of their class.
    name_prefix = ""

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if type(module).__module__.startswith("torch.nn."):
            return False
        return _drops(module) or _multiplies(module) or _scales(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module."""
        if not (self.training and self.razor_enabled):
            return super().forward(*args, **kwargs)
        with _Inline(self):
            return super().forward(*args, **kwargs)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        what = ["functional dropout in 1 bit"] if _drops(self) else []
        if _multiplies(self):
            what.append(f"gated product in {self.razor_config.activation_bits} bits")
        if _scales(self):
            what.append("scaled tensor, " + describe(input_spec(self.razor_config)).removeprefix("razor="))
        return "razor=" + ", ".join(what)


def _source(module: nn.Module) -> str:
    return forward_source(module.plain_class if isinstance(module, RazorModule) else type(module))


def _drops(module: nn.Module) -> bool:
    return bool(_DROPOUT.search(_source(module)))


def _multiplies(module: nn.Module) -> bool:
    has_activation = any(
        isinstance(child, RazorActivation) or RazorActivation.handles(child) for child in module.children()
    )
    return has_activation and bool(_PRODUCT.search(_source(module)))


def _scales(module: nn.Module) -> bool:
    # PEFT keeps a vector for each adapter in a dictionary. Norms have an operator of their own, or a warning.
    owners = [module, *(child for child in module.children() if isinstance(child, nn.ParameterDict))]
    shapes = [whole_shape(parameter) for owner in owners for parameter in owner.parameters(recurse=False)]
    if not shapes or any(shape.numel() != max(shape, default=0) for shape in shapes):
        return False
    return not type(module).__name__.endswith("Norm") and bool(_PRODUCT.search(_source(module)))


class _Inline(TorchFunctionMode):
    """Takes the calls in question while it is active."""

    def __init__(self, module: RazorInline) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        if func in _MULTIPLICATIONS and not kwargs and self._is_gated(*args):
            return product(*args, product_spec(self._module.razor_config))
        if func in _MULTIPLICATIONS and not kwargs:
            for x, scale in (args, args[::-1]):
                if self._is_scaled(x, scale):
                    return scaling(x, scale, input_spec(self._module.razor_config))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        module = self._module
        if training and not inplace and 0 < p < 1 and module.razor_active(input) and module.worth_packing(input):
            return dropout(input, p)
        return F.dropout(input, p, training, inplace)

    def _is_gated(self, x: Any, y: Any) -> bool:
        """Whether one of the factors can be restored from what an activation function saves."""
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype):
            return False
        if not (self._module.razor_active(x, y) and self._module.worth_packing(x)):
            return False
        return any((origin := origin_of(factor)) is not None and origin.layout.coarse for factor in (x, y))

    def _is_scaled(self, x: Any, scale: Any) -> bool:
        """Whether `scale` is a trained vector along the last dimension of `x`, so that `x` would be saved for it."""
        if not (isinstance(x, Tensor) and isinstance(scale, Tensor) and scale.requires_grad):
            return False
        if not (0 < scale.dim() <= x.dim() and scale.numel() == scale.shape[-1] == x.shape[-1] < x.numel()):
            return False
        return self._module.razor_active(scale) and self._module.worth_packing(x)
