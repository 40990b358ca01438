"""Razor versions of the modules that models are made of.

An operator is one class, derived from `RazorModule`, in one file of this folder; `OPERATORS` lists them. `RazorLMHead`
stands beside the list: which layer is a language model's head, its type does not tell.
"""

from __future__ import annotations

from .activation import RazorActivation
from .attention import RazorAttention
from .base import RazorModule
from .batch_norm import RazorBatchNorm
from .convolution import RazorConvolution
from .dropout import RazorDropout
from .inline import RazorInline
from .linear import RazorConv1D, RazorLinear
from .lm_head import RazorLMHead
from .norm import RazorLayerNorm, RazorRMSNorm
from .pooling import RazorMaxPool2d

OPERATORS: tuple[type[RazorModule], ...] = (
    RazorLinear,
    RazorConv1D,
    RazorLayerNorm,
    RazorRMSNorm,
    RazorConvolution,
    RazorBatchNorm,
    RazorMaxPool2d,
    RazorActivation,
    RazorDropout,
    RazorAttention,
    RazorInline,
)

__all__ = [
    "OPERATORS",
    "RazorActivation",
    "RazorAttention",
    "RazorBatchNorm",
    "RazorConv1D",
    "RazorConvolution",
    "RazorDropout",
    "RazorInline",
    "RazorLMHead",
    "RazorLayerNorm",
    "RazorLinear",
    "RazorMaxPool2d",
    "RazorModule",
    "RazorRMSNorm",
]
