"""The ways to train that the commands compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

# Gives the model prepared; None if it cannot be prepared that way.
Variant = Callable[[Any], Any]


def _razor(preset: str, **changes: Any) -> Variant:
    def prepare(model: Any) -> Any:
        from .. import RazorConfig, get_razor_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_razor_model(model, RazorConfig.preset(preset, **changes))

    return prepare


def _with_blocks(variant: Variant) -> Variant:
    """The variant, for models that have blocks to compute again."""

    def prepare(model: Any) -> Any:
        from .. import RazorConfig
        from ..modules.block import find_blocks

        try:
            find_blocks(model, RazorConfig.preset("compact"))
        except ValueError:
            return None
        return variant(model)

    return prepare


def _checkpointing(model: Any) -> Any:
    if not model.supports_gradient_checkpointing:
        return None
    # The former name, up to Transformers 5.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


VARIANTS: dict[str, Variant] = {
    "dense": lambda model: model,
    "activation checkpointing": _checkpointing,
    "razor, lossless": _razor("lossless"),
    "razor, paper 0.8": _razor("paper", sparsity=0.8),
    "razor, paper 0.9": _razor("paper", sparsity=0.9),
    "razor, balanced": _razor("balanced"),
    "razor, fast": _razor("fast"),
    "razor, compact": _with_blocks(_razor("compact")),
}

# From the best gradients to the coarsest, but for `compact`: better ones than `balanced`, for more computation. Those
# that give None are left out. Between the presets: the fields that docs/choosing-bits.md finds worth most.
LADDER: dict[str, tuple[Variant, str]] = {
    "dense": (VARIANTS["dense"], ""),
    "lossless": (VARIANTS["razor, lossless"], 'RazorConfig.preset("lossless")'),
    "finer than balanced": (
        _razor("balanced", activation_bits=8, norm_bits=4, qkv_bits=8),
        "RazorConfig(activation_bits=8, norm_bits=4, qkv_bits=8)",
    ),
    "balanced": (VARIANTS["razor, balanced"], "RazorConfig()"),
    "compact": (VARIANTS["razor, compact"], 'RazorConfig.preset("compact")'),
    "compact, 2 bits": (
        _with_blocks(_razor("compact", stream_bits=2)),
        'RazorConfig.preset("compact", stream_bits=2)',
    ),
    "coarser than balanced": (
        _razor("balanced", activation_bits=3, norm_bits=2),
        "RazorConfig(activation_bits=3, norm_bits=2)",
    ),
    "coarsest": (
        _razor("balanced", activation_bits=2, norm_bits=1, residual_bits=1, sparsity=0.995),
        "RazorConfig(activation_bits=2, norm_bits=1, residual_bits=1, sparsity=0.995)",
    ),
}
