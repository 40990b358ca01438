"""The logits of dense prediction as large as the image: computed band by band for the loss, or when asked for."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from ..functional import Resizing, interpolated_cross_entropy
from ..functional.precision import autocast_is_on
from .base import RazorModule, class_source
from .lazy import LazyTensor, widened_dtype

logger = logging.get_logger(__name__)

_RESIZES, _TAKES_LOSS = re.compile(r"\binterpolate\("), re.compile(r"\b(?:CrossEntropyLoss|cross_entropy)\(")


def resizes_logits(module: nn.Module) -> bool:
    """Whether the module's own code resizes something, and computes a cross entropy."""
    cls = module.plain_class if isinstance(module, RazorModule) else type(module)
    source = class_source(cls)
    # By a class's name Transformers chooses a loss function that does both.
    chosen = "SemanticSegmentation" in cls.__name__ and "self.loss_function(" in source
    return chosen or bool(_RESIZES.search(source) and _TAKES_LOSS.search(source))


class LazyResizedLogits(LazyTensor):
    """`interpolate(logits, ...)`, not computed yet.

    Attributes:
        logits: `(batch, classes, height, width)`.
        resizing: what becomes of height and width.
    """

    logits: Tensor
    resizing: Resizing

    @staticmethod
    def __new__(cls, logits: Tensor, resizing: Resizing, dtype: torch.dtype | None = None) -> LazyResizedLogits:
        self = cls.standing_for((*logits.shape[:2], *resizing.size), dtype or logits.dtype, logits.device)
        self.logits, self.resizing = logits, resizing
        return self

    def _compute(self, asked_by: str) -> Tensor:
        logger.warning_once(
            f"the resized logits {tuple(self.shape)} are computed whole, as `{asked_by}` asks for them; "
            "`torch.nn.functional.cross_entropy` over class numbers does without"
        )
        size, mode, align_corners = self.resizing
        return F.interpolate(self.logits, size, mode=mode, align_corners=align_corners).to(self.dtype)


def _cross_entropy(
    x: LazyResizedLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    of_classes = isinstance(target, Tensor) and target.dtype == torch.int64
    fits = of_classes and target.shape == (x.shape[0], *x.shape[2:])
    if not fits or size_average is not None or reduce is not None or reduction not in ("sum", "mean"):
        return NotImplemented
    loss = interpolated_cross_entropy(x.logits, target, x.resizing, weight, ignore_index, label_smoothing, reduction)
    # Autocast computes cross entropy in float32, whatever the logits come in.
    dtype = torch.promote_types(x.dtype, torch.float32) if autocast_is_on(x.device.type) else x.dtype
    return loss.to(dtype)


def _cast(x: LazyResizedLogits, *args: Any, **kwargs: Any) -> Any:
    # Accelerate widens what a model returns.
    dtype = widened_dtype(x, *args, **kwargs)
    return NotImplemented if dtype is None else LazyResizedLogits(x.logits, x.resizing, dtype)


def _to_float(x: LazyResizedLogits) -> Any:
    return _cast(x, torch.float32)


LazyResizedLogits.handlers = {"cross_entropy": _cross_entropy, "to": _cast, "float": _to_float}
