"""Heads with as many outputs as there are tokens: logits that are computed when they are asked for.

In training, the head returns a tensor that only knows what it is the product of. The cross entropy of it is computed
tile by tile. Whatever else is done with it, beyond casts, scalings and reshapings, makes it compute itself as the plain
head would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from ..functional import linear_cross_entropy
from ..functional.precision import autocast_is_on, current_autocast
from .lazy import LazyTensor, widened_dtype
from .linear import RazorLinear

logger = logging.get_logger(__name__)


class RazorLMHead(RazorLinear):
    """The output embeddings of a language model. Which layer that is, only the model knows."""

    kind = "head"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return RazorLinear.handles(module)

    # The compiler traces the plain head: it knows nothing of a tensor that is not there yet.
    __call__ = nn.Module.__call__

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; in training the logits are computed when they are needed."""
        if torch.compiler.is_compiling():
            return self.plain_class.forward(self, x)
        if not self.razor_active(x, self.weight) or not self.worth_packing(x) or _leaves_after_forward(self):
            return super().forward(x)
        return LazyLogits(x, self.weight, self.bias)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return "razor=loss in tiles, logits on demand"


def _leaves_after_forward(head: nn.Module) -> bool:
    """Whether the head's weight is gone, as it is sharded, when the loss needs it."""
    if hasattr(head.weight, "ds_id"):  # ZeRO-3
        return True
    if not isinstance(head, FSDPModule):  # FSDP2 leaves what it gathered with the model itself
        return False
    group = getattr(head._get_fsdp_state(), "_fsdp_param_group", None)
    return getattr(group, "_reshard_after_forward", True)


class LazyLogits(LazyTensor):
    """The logits `f(hidden weight^T + bias)`, not computed yet.

    Attributes:
        hidden: `(..., features)`.
        weight: `(classes, features)`.
        bias: `(classes,)` or None.
        steps: the elementwise functions that make up f.
        before_backward: hooks of FSDP that gather the weight before its gradient is computed.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[Callable[[Tensor], Tensor], ...]
    before_backward: list[Callable[[Tensor], Tensor]]

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        steps: tuple[Callable[[Tensor], Tensor], ...] = (),
        dtype: torch.dtype | None = None,
    ) -> LazyLogits:
        if dtype is None:
            # As the plain head's, under autocast as well.
            dtype = F.linear(hidden[..., :0, :].detach(), weight[:1].detach()).dtype
        self = cls.standing_for((*hidden.shape[:-1], weight.shape[0]), dtype, hidden.device)
        self.hidden, self.weight, self.bias, self.steps = hidden, weight, bias, steps
        # The loss may be computed, and the logits asked for, outside of the autocast that the head was called in.
        self.autocast = current_autocast(hidden.device.type)
        self.before_backward = []
        return self

    def elementwise(self, z: Tensor) -> Tensor:
        """f."""
        for step in self.steps:
            z = step(z)
        return z

    @property
    def loss_elementwise(self) -> Callable[[Tensor], Tensor] | None:
        """f, if the loss has to differentiate it. Widening it does by itself."""
        return None if all(isinstance(step, _Widening) for step in self.steps) else self.elementwise

    def _with(self, hidden: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...], dtype: torch.dtype) -> LazyLogits:
        result = LazyLogits(hidden, self.weight, self.bias, steps, dtype)
        result.autocast, result.before_backward = self.autocast, self.before_backward
        return result

    def then(self, step: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> LazyLogits:
        """With one more elementwise function, after which the dtype is `dtype`."""
        return self._with(self.hidden, (*self.steps, step), dtype or self.dtype)

    def of_tokens(self, hidden: Tensor) -> LazyLogits:
        """The logits of other tokens, or of the same ones in another shape."""
        return self._with(hidden, self.steps, self.dtype)

    def _compute(self, asked_by: str) -> Tensor:
        self._require_weight()
        logger.warning_once(
            f"the logits of the head with {self.weight.shape[0]} outputs are computed whole, as `{asked_by}` asks "
            "for them; `torch.nn.functional.cross_entropy` over class numbers does without"
        )
        with self.autocast:
            dense = self.elementwise(F.linear(self.hidden, self.weight, self.bias))
        self._gather_before_backward_of(dense)
        return dense

    def loss(self, labels: Tensor, ignore_index: int, label_smoothing: float, reduction: str) -> Tensor:
        """Their cross entropy; see `linear_cross_entropy`."""
        self._require_weight()
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        options = (self.loss_elementwise, ignore_index, label_smoothing, reduction)
        with self.autocast:
            loss = linear_cross_entropy(hidden, self.weight, self.bias, labels.reshape(-1), *options)
        self._gather_before_backward_of(loss)
        return loss

    def _require_weight(self) -> None:
        if self.weight.untyped_storage().size() == 0 < self.weight.numel():
            raise RuntimeError(
                f"the logits of the head with {self.weight.shape[0]} outputs are asked for when FSDP has sharded its "
                "weight again: give the model labels, so that it takes the loss in its forward, read the logits before "
                "backward, and shard the whole model without `reshard_after_forward=True`"
            )

    def _gather_before_backward_of(self, result: Tensor) -> None:
        if result.requires_grad:
            for hook in self.before_backward:
                result.register_hook(hook)


class LazyLogProbs(LazyLogits):
    """`sign` times the log probabilities that belong to logits, not computed yet: what Trainer smooths labels with."""

    sign = 1

    @classmethod
    def of(cls, x: LazyLogits, sign: int) -> LazyLogProbs:
        """Those of the same head and tokens as `x`."""
        self = cls(x.hidden, x.weight, x.bias, x.steps, x.dtype)
        self.sign, self.autocast, self.before_backward = sign, x.autocast, x.before_backward
        return self

    def _compute(self, asked_by: str) -> Tensor:
        return self.sign * F.log_softmax(super()._compute(asked_by), dim=-1)

    def of_labels(self, labels: Tensor, label_smoothing: float) -> Tensor:
        """That of each token's label, or with a smoothing of 1 the mean over all classes: as `labels`."""
        # No label is ignored: gather refuses negative ones.
        return -self.sign * self.loss(labels, -1, label_smoothing, "none").view(labels.shape)


class _Widening(NamedTuple):
    """A cast that changes no value."""

    dtype: torch.dtype

    def __call__(self, z: Tensor) -> Tensor:
        return z.to(self.dtype)


def _cast(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype = widened_dtype(x, *args, **kwargs)
    if dtype is None:
        return NotImplemented
    return x if dtype == x.dtype else x.then(_Widening(dtype), dtype)


def _to_float(x: LazyLogits) -> LazyLogits:
    return _cast(x, torch.float32)


def _register_hook(x: LazyLogits, hook: Callable[[Tensor], Tensor]) -> Any:
    # FSDP's look at no gradient: they run before the backward of a module's output, to gather its weights.
    function = getattr(hook, "func", hook)
    if not (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp"):
        return NotImplemented
    x.before_backward.append(hook)
    return None


def _contiguous(x: LazyLogits, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    return x if memory_format == torch.contiguous_format else NotImplemented


def _reshape(x: LazyLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    if not all(isinstance(size, int) for size in shape):
        return NotImplemented
    classes = x.weight.shape[0]
    # Any other last dimension mixes classes; torch itself says so where the sizes do not fit.
    if not shape or (shape[-1] != classes and (shape[-1] != -1 or math.prod(shape[:-1]) * classes != x.numel())):
        return NotImplemented
    if -1 not in shape[:-1] and math.prod(shape[:-1]) * classes != x.numel():
        return NotImplemented
    return x.of_tokens(x.hidden.reshape(*shape[:-1], x.hidden.shape[-1]))


def _index(x: LazyLogits, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is Ellipsis or isinstance(item, (int, slice)) for item in index):
        return NotImplemented
    reaches_classes = len(index) == x.dim() if Ellipsis not in index else index[-1] is not Ellipsis
    if reaches_classes and index[-1] != slice(None):
        return NotImplemented
    return x.of_tokens(x.hidden[index])


def _scaled(function: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    def handler(x: LazyLogits, factor: Any, **kwargs: Any) -> Any:
        if kwargs or not isinstance(factor, (int, float)):
            return NotImplemented
        return x.then(lambda z: function(z, factor))

    return handler


def _add(x: LazyLogits, other: Any, **kwargs: Any) -> Any:
    """Plus one number for each class, as BART's `final_logits_bias`: part of the bias."""
    classes = x.weight.shape[0]
    of_classes = isinstance(other, Tensor) and other.numel() == classes and other.shape[-1:] == (classes,)
    if kwargs or not of_classes or x.steps or other.dtype != x.dtype or other.dim() > x.dim():
        return NotImplemented
    bias = other.view(classes) if x.bias is None else x.bias + other.view(classes)
    result = x.of_tokens(x.hidden)
    result.bias = bias
    return result


def _tanh(x: LazyLogits) -> LazyLogits:
    return x.then(torch.tanh)


def _cross_entropy(
    x: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    of_classes = isinstance(target, Tensor) and target.dtype == torch.int64
    plain = of_classes and weight is None and size_average is None and reduce is None
    if not plain or x.dim() != 2 or target.shape != x.shape[:1] or reduction not in ("none", "sum", "mean"):
        return NotImplemented
    # Autocast computes cross entropy in float32, whatever the logits come in.
    dtype = torch.promote_types(x.dtype, torch.float32) if autocast_is_on(x.device.type) else x.dtype
    return x.loss(target, ignore_index, label_smoothing, reduction).to(dtype)


def _log_softmax(x: LazyLogits, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim not in (-1, x.dim() - 1) or dtype not in (None, x.dtype):
        return NotImplemented
    return LazyLogProbs.of(x, 1)


def _negated(x: LazyLogProbs) -> LazyLogProbs:
    return LazyLogProbs.of(x, -x.sign)


def _gather(x: LazyLogProbs, dim: int, index: Tensor) -> Any:
    if dim not in (-1, x.dim() - 1) or index.shape != (*x.shape[:-1], 1):
        return NotImplemented
    return x.of_labels(index, label_smoothing=0.0).to(x.dtype)


def _sum(x: LazyLogProbs, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
    if dim not in (-1, x.dim() - 1):
        return NotImplemented
    labels = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    total = x.of_labels(labels, label_smoothing=1.0).to(dtype or x.dtype) * x.weight.shape[0]
    return total.unsqueeze(-1) if keepdim else total


LazyLogProbs.handlers = {
    "neg": _negated,
    "__neg__": _negated,
    "gather": _gather,
    "sum": _sum,
}
LazyLogits.handlers = {
    "cross_entropy": _cross_entropy,
    "register_hook": _register_hook,
    "log_softmax": _log_softmax,
    "to": _cast,
    "float": _to_float,
    "contiguous": _contiguous,
    "view": _reshape,
    "reshape": _reshape,
    "__getitem__": _index,
    "add": _add,
    "__add__": _add,
    "tanh": _tanh,
    "mul": _scaled(torch.mul),
    "__mul__": _scaled(torch.mul),
    "__rmul__": _scaled(torch.mul),
    "div": _scaled(torch.div),
    "__truediv__": _scaled(torch.div),
    "true_divide": _scaled(torch.div),
}
