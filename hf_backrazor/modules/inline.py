"""Operators that a module's own forward applies without a module for them.

These are dropout as a function (`nn.functional.dropout`, in OPT, BART and Whisper), and the product of a gated MLP
(`act(gate) * up`, in Llama and its kin).
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..functional import dropout, product
from ..functional.sharing import origin_of
from .activation import RazorActivation
from .base import RazorModule, forward_source, product_spec

_DROPOUT = re.compile(r"\b(?:functional|F)\.dropout\(")
_PRODUCT = re.compile(r"[^*]\*\s*[\w(]|\bmul(?:tiply)?\(")
_MULTIPLICATIONS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply)


class RazorInline(RazorModule):
    """A module whose forward calls `nn.functional.dropout`, or multiplies the output of its activation function."""

    kind = "inline"
    # These are the decoder layers that FSDP and device maps know by the name of their class.
    name_prefix = ""

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if type(module).__module__.startswith("torch.nn."):
            return False
        return _drops(module) or _multiplies(module)

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
