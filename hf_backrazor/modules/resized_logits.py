"""The logits of dense prediction as large as the image: computed band by band for the loss, or when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import DisableTorchFunction
from ..functional import Resizing, interpolated_cross_entropy
from ..functional.precision import autocast_is_on
from .elements import Computation
from .lazy import Description, LazyTensor, widened_dtype


@dataclass(frozen=True, eq=False)
class Resized(Description):
    """`interpolate(logits, ...)`.

    Attributes:
        computation: of the elements.
        logits: `(batch, classes, height, width)`.
        resizing: what becomes of height and width.
    """

    computation: Computation
    logits: Tensor
    resizing: Resizing


class ResizingComputation(Computation):
    """`interpolate(logits, ...)`.

    Args:
        logits: `(batch, classes, height, width)`.
        resizing: what becomes of height and width.
        dtype: that it is computed in, which autocast may choose.
    """

    def __init__(self, logits: Tensor, resizing: Resizing, dtype: torch.dtype) -> None:
        super().__init__((logits,), f"the resized logits {(*logits.shape[:2], *resizing.size)}")
        self._resizing, self._dtype = resizing, dtype

    def forward(self, *inputs: Any) -> Tensor:
        """See `Computation.forward`."""
        return resize(inputs[0].to(self._dtype), self._resizing)

    def gradients(self, grad: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """See `Computation.gradients`."""
        # Resizing once more takes little time, and keeps nothing in between.
        with torch.enable_grad():
            logits = self.inputs[0].view_as(self.inputs[0])
            resized = self.forward(logits)
        return torch.autograd.grad(resized, logits, grad, create_graph=torch.is_grad_enabled())


class LazyResizedLogits(LazyTensor):
    """`interpolate(logits, ...)`, not computed yet; its cross entropy is taken band by band."""

    @staticmethod
    def __new__(cls, logits: Tensor, resizing: Resizing) -> LazyResizedLogits:
        """See `Resized`."""
        with DisableTorchFunction():
            dtype = resize(logits.detach()[:1, :1, :1, :1], resizing._replace(size=(1, 1))).dtype
            meta = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device="meta")
            like = resize(meta, resizing)
        return cls.deferred(Resized(ResizingComputation(logits, resizing, dtype), logits, resizing), like)


def resize(logits: Tensor, resizing: Resizing) -> Tensor:
    """`interpolate` as `resizing` says."""
    return F.interpolate(logits, resizing.size, mode=resizing.mode, align_corners=resizing.align_corners)


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
    logits, resizing = x.description.logits, x.description.resizing
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        loss = interpolated_cross_entropy(logits, target, resizing, weight, ignore_index, label_smoothing, reduction)
    # Autocast computes cross entropy in float32, whatever the logits come in.
    dtype = torch.promote_types(x.dtype, torch.float32) if autocast_is_on(x.device.type) else x.dtype
    return loss.to(dtype)


def _cast(x: LazyResizedLogits, *args: Any, **kwargs: Any) -> Any:
    # Accelerate widens what a model returns.
    return NotImplemented if widened_dtype(x, *args, **kwargs) is None else x.description


def _to_float(x: LazyResizedLogits) -> Any:
    return _cast(x, torch.float32)


Resized.results = {F.cross_entropy: _cross_entropy}
Resized.steps = {Tensor.to: _cast, Tensor.float: _to_float}
