"""Razor versions of the modules that models are made of.

An operator is one class, derived from `RazorModule`, in one file of this folder; `OPERATORS` lists them. Some stand
beside the list, as a type does not tell which layer is a language model's head (`RazorLMHead`) or which modules are to
be computed again (`RazorBlock`). And what a module's own code does is seen when it runs: which functions it calls
(`RazorInline`; `RazorOutermost` for the model itself), and whether it saves much that no operator takes
(`RazorRecomputed`). A module may be both, and have an operator as well.
"""

from __future__ import annotations

from .activation import RazorActivation, count_gates
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
from .own_calls import Apart
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
    RazorAdapter,
)

__all__ = [
    "OPERATORS",
    "Apart",
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
    "count_gates",
    "find_blocks",
    "running_sums",
    "sees_probes",
    "stack_blocks",
    "with_lazy_logits",
]
