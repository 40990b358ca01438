"""Dropout that a module's own forward calls as a function (`nn.functional.dropout`), as OPT, BART and Whisper do."""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..functional import dropout
from .base import RazorModule, forward_source

_CALL = re.compile(r"\b(?:functional|F)\.dropout\(")


class RazorFunctionalDropout(RazorModule):
    """A module whose forward calls `nn.functional.dropout`; the calls save one bit an element."""

    kind = "dropout"
    # These are the decoder layers that FSDP and device maps know by the name of their class.
    name_prefix = ""

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return not type(module).__module__.startswith("torch.nn.") and bool(_CALL.search(forward_source(type(module))))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module."""
        if not (self.training and self.razor_enabled):
            return super().forward(*args, **kwargs)
        with _PackedDropout(self):
            return super().forward(*args, **kwargs)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return "razor=functional dropout in 1 bit"


class _PackedDropout(TorchFunctionMode):
    """Takes calls of `nn.functional.dropout` while it is active."""

    def __init__(self, module: RazorFunctionalDropout) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        module = self._module
        if training and not inplace and 0 < p < 1 and module.razor_active(input) and module.worth_packing(input):
            return dropout(input, p)
        return F.dropout(input, p, training, inplace)
