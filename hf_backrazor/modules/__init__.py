"""Razor versions of the modules that models are made of.

An operator is one class, derived from `RazorModule`, in one file of this folder; `OPERATORS` lists them. Four stand
beside the list, as a type does not tell which layer is a language model's head (`RazorLMHead`), which module is the
model itself (`RazorOutermost`), which modules are to be computed again (`RazorBlock`), nor which save much that no
operator takes (`RazorRecomputed`).
"""

from __future__ import annotations

from .activation import RazorActivation
from .adapter import RazorAdapter
from .attention import RazorAttention
from .base import RazorModule
from .batch_norm import RazorBatchNorm
from .block import RazorBlock, find_blocks, running_sums, stack_blocks
from .convolution import RazorConvolution
from .dropout import RazorDropout
from .group_norm import RazorGroupNorm, RazorInstanceNorm
from .inline import RazorInline, RazorOutermost
from .linear import RazorConv1D, RazorLinear
from .lm_head import RazorLMHead, with_lazy_logits
from .norm import RazorLayerNorm, RazorRMSNorm
from .padding import RazorZeroPad
from .pooling import RazorAveragePool2d, RazorMaxPool2d
from .probe import sees_probes
from .quantized import RazorQuantizedLinear
from .recomputed import RazorRecomputed

OPERATORS: tuple[type[RazorModule], ...] = (
    RazorQuantizedLinear,
    RazorLinear,
    RazorConv1D,
    RazorLayerNorm,
    RazorRMSNorm,
    RazorConvolution,
    RazorBatchNorm,
    RazorGroupNorm,
    RazorInstanceNorm,
    RazorMaxPool2d,
    RazorAveragePool2d,
    RazorZeroPad,
    RazorActivation,
    RazorDropout,
    RazorAttention,
    RazorInline,
    RazorAdapter,
)

__all__ = [
    "OPERATORS",
    "RazorActivation",
    "RazorAdapter",
    "RazorAttention",
    "RazorAveragePool2d",
    "RazorBatchNorm",
    "RazorBlock",
    "RazorConv1D",
    "RazorConvolution",
    "RazorDropout",
    "RazorGroupNorm",
    "RazorInline",
    "RazorInstanceNorm",
    "RazorLMHead",
    "RazorLayerNorm",
    "RazorLinear",
    "RazorMaxPool2d",
    "RazorModule",
    "RazorOutermost",
    "RazorQuantizedLinear",
    "RazorRMSNorm",
    "RazorRecomputed",
    "RazorZeroPad",
    "find_blocks",
    "running_sums",
    "sees_probes",
    "stack_blocks",
    "with_lazy_logits",
]
