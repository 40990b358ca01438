"""Heads with as many outputs as there are tokens: logits that are computed when they are asked for.

In training, the head returns a tensor that only knows what it is the product of. The cross entropy of it is computed
tile by tile. Whatever else is done with it, beyond casts, scalings and reshapings, makes it compute itself as the plain
head would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..functional import linear_cross_entropy, linear_gather
from ..functional.precision import autocast_is_on, current_autocast, without_autocast
from .elements import Computation
from .lazy import Description, LazyTensor, widened_dtype
from .linear import RazorLinear
from .own_calls import without_own_calls

# Logits of a token that are computed by themselves; of more, all are.
MOST_CHOSEN = 16


class RazorLMHead(RazorLinear):
    """The output embeddings of a language model. Which layer that is, only the model knows."""

    kind = "head"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return RazorLinear.handles(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's. The compiler traces that: it knows nothing of a tensor that is not there yet."""
        if torch.compiler.is_compiling():
            return nn.Module.__call__(self, *args, **kwargs)
        with without_own_calls():
            return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; in training the logits are computed when they are needed."""
        if torch.compiler.is_compiling():
            return self.plain_class.forward(self, input)
        if not self.packs(input, parameters=("weight",)) or _leaves_after_forward(self):
            return super().forward(input)
        return LazyLogits(input, self.weight, self.bias)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return "razor=loss in tiles, logits on demand"


def _leaves_after_forward(head: nn.Module) -> bool:
    """Whether the head's weight is gone, as it is sharded, when the loss needs it."""
    if hasattr(head._parameters.get("weight"), "ds_id"):  # ZeRO-3
        return True
    if not isinstance(head, FSDPModule):  # FSDP2 leaves what it gathered with the model itself
        return False
    group = getattr(head._get_fsdp_state(), "_fsdp_param_group", None)
    return getattr(group, "_reshard_after_forward", True)


class HeadComputation(Computation):
    """`hidden weight^T + bias`.

    Args:
        hidden: `(..., features)`.
        weight: `(classes, features)`.
        bias: `(classes,)` or None.
        dtype: that it is computed in, which autocast may choose.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__((hidden, weight, bias), f"the logits of the head with {weight.shape[0]} outputs")
        self._dtype = dtype

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """See `Computation.forward`."""
        return F.linear(*(None if x is None else x.to(self._dtype) for x in inputs))

    def gradients(self, grad: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """See `Computation.gradients`."""
        hidden, weight, bias = self.inputs
        rows = grad.reshape(-1, grad.shape[-1])
        with without_autocast(grad.device.type):
            return (
                (grad @ weight.to(self._dtype)).to(hidden.dtype) if needed[0] else None,
                (rows.t() @ hidden.to(self._dtype).reshape(rows.shape[0], -1)).to(weight.dtype) if needed[1] else None,
                rows.sum(0).to(bias.dtype) if needed[2] else None,
            )

    def elements(self, asked_by: str) -> Tensor:
        """See `Computation.elements`."""
        if self._weight_is_gone():
            raise RuntimeError(
                f"{self.name} are asked for when FSDP has sharded its weight again: give the model labels, so that it "
                "takes the loss in its forward, read the logits before backward, and shard the whole model without "
                "`reshard_after_forward=True`"
            )
        return super().elements(asked_by)

    def unchanged(self) -> bool:
        """See `Computation.unchanged`."""
        return not self._weight_is_gone() and super().unchanged()

    def _weight_is_gone(self) -> bool:
        weight = self.inputs[1]
        return weight.untyped_storage().size() == 0 < weight.numel()


class LazyLogits(LazyTensor):
    """`hidden weight^T + bias`, not computed yet; the cross entropy of it is taken tile by tile."""

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
        """See `Logits`."""
        # As the plain head's, under autocast as well.
        dtype = F.linear(hidden[..., :0, :].detach(), weight[:1].detach()).dtype
        like = torch.empty((*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")
        # The loss may be computed outside of the autocast that the head was called in.
        autocast = current_autocast(hidden.device.type)
        return cls.deferred(Logits(HeadComputation(hidden, weight, bias, dtype), hidden, weight, bias, autocast), like)


class Elementwise(tuple[Callable[[Tensor], Tensor], ...]):
    """Functions of each logit, one after the other."""

    __slots__ = ()

    def __call__(self, z: Tensor) -> Tensor:
        for step in self:
            z = step(z)
        return z


@dataclass(frozen=True, eq=False)
class Logits(Description):
    """The logits `f(hidden weight^T + bias)`.

    Attributes:
        computation: of the product.
        hidden: `(..., features)`.
        weight: `(classes, features)`.
        bias: `(classes,)` or None.
        autocast: what the head was called in.
        f: elementwise functions.
        before_backward: hooks of FSDP that gather the weight before its gradient is computed.
    """

    computation: Computation
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    autocast: AbstractContextManager
    f: Elementwise = field(default_factory=Elementwise)
    before_backward: list[Callable[[Tensor], Any]] = field(default_factory=list)

    def call_before_backward(self, hook: Callable[[Tensor], Any]) -> None:
        """See `Description.call_before_backward`."""
        self.before_backward.append(hook)

    def then(self, step: Callable[[Tensor], Tensor]) -> Logits:
        """With one more elementwise function."""
        return replace(self, f=Elementwise((*self.f, step)))

    def loss(
        self, labels: Tensor, ignore_index: int, label_smoothing: float, reduction: str, differentiable: bool
    ) -> Tensor:
        """Their cross entropy; see `linear_cross_entropy`."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        # Widening the loss does by itself.
        f = None if all(isinstance(step, _Widening) for step in self.f) else self.f
        with self.autocast, torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
            loss = linear_cross_entropy(
                hidden, self.weight, self.bias, labels.reshape(-1), f, ignore_index, label_smoothing, reduction
            )
        return self._hooked(loss)

    def chosen(self, index: Tensor, differentiable: bool) -> Tensor:
        """The logits of the classes that `index`, `(..., chosen)`, names for each token."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        with self.autocast, torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
            z = linear_gather(hidden, self.weight, self.bias, index.reshape(-1, index.shape[-1]))
            return self._hooked(self.f(z).view(index.shape))

    def logsumexp(self, differentiable: bool) -> Tensor:
        """Of all classes, for each token, in float32 or wider."""
        # A token's cross entropy is this less the logit of its label.
        first = torch.zeros((*self.hidden.shape[:-1], 1), dtype=torch.int64, device=self.hidden.device)
        loss = self.loss(first, torch.iinfo(torch.int64).min, 0.0, "none", differentiable)
        return loss.view(first.shape[:-1]) + self.chosen(first, differentiable).squeeze(-1)

    def _hooked(self, result: Tensor) -> Tensor:
        if result.requires_grad:
            for hook in self.before_backward:
                result.register_hook(hook)
        return result


@dataclass(frozen=True, eq=False)
class LogProbs(Description):
    """`sign` times the log probabilities of logits: what Trainer smooths labels with.

    Attributes:
        logits: what the logits are.
        sign: 1 or -1.
    """

    logits: Logits
    sign: int = 1

    @property
    def computation(self) -> Computation:
        """Of the logits."""
        return self.logits.computation

    def call_before_backward(self, hook: Callable[[Tensor], Any]) -> None:
        """See `Description.call_before_backward`."""
        self.logits.call_before_backward(hook)

    def of_labels(self, labels: Tensor, label_smoothing: float, differentiable: bool) -> Tensor:
        """That of each token's label, or with a smoothing of 1 the mean over all classes: as `labels`."""
        # No label is ignored: gather refuses negative ones.
        loss = self.logits.loss(labels, torch.iinfo(labels.dtype).min, label_smoothing, "none", differentiable)
        return -self.sign * loss.view(labels.shape)


class _Widening(NamedTuple):
    """A cast that changes no value."""

    dtype: torch.dtype

    def __call__(self, z: Tensor) -> Tensor:
        return z.to(self.dtype)


def _cast(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype = widened_dtype(x, *args, **kwargs)
    return NotImplemented if dtype is None else x.description.then(_Widening(dtype))


def _to_float(x: LazyLogits) -> Any:
    return _cast(x, torch.float32)


def _same(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    return x.description


def _reshape(x: LazyLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    if not all(isinstance(size, int) for size in shape):
        return NotImplemented
    hidden, classes = x.description.hidden, x.description.weight.shape[0]
    # Any other last dimension mixes classes; torch itself says so where the sizes do not fit.
    if not shape or (shape[-1] != classes and (shape[-1] != -1 or math.prod(shape[:-1]) * classes != x.numel())):
        return NotImplemented
    if -1 not in shape[:-1] and math.prod(shape[:-1]) * classes != x.numel():
        return NotImplemented
    return replace(x.description, hidden=hidden.reshape(*shape[:-1], hidden.shape[-1]))


def _index(x: LazyLogits, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is Ellipsis or isinstance(item, (int, slice)) for item in index):
        return NotImplemented
    reaches_classes = len(index) == x.dim() if Ellipsis not in index else index[-1] is not Ellipsis
    if reaches_classes and index[-1] != slice(None):
        return NotImplemented
    return replace(x.description, hidden=x.description.hidden[index])


def _scaled(function: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    def step(x: LazyLogits, factor: Any, **kwargs: Any) -> Any:
        if kwargs or not isinstance(factor, (int, float)):
            return NotImplemented
        return x.description.then(lambda z: function(z, factor))

    return step


def _add(x: LazyLogits, other: Any, **kwargs: Any) -> Any:
    """Plus one number for each class, as BART's `final_logits_bias`: part of the bias."""
    bias, classes = x.description.bias, x.description.weight.shape[0]
    of_classes = isinstance(other, Tensor) and other.numel() == classes and other.shape[-1:] == (classes,)
    if kwargs or not of_classes or x.description.f or other.dtype != x.dtype or other.dim() > x.dim():
        return NotImplemented
    return replace(x.description, bias=other.view(classes) + (0 if bias is None else bias))


def _tanh(x: LazyLogits) -> Any:
    return x.description.then(torch.tanh)


def _log_softmax(x: LazyLogits, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim not in (-1, x.dim() - 1) or dtype not in (None, x.dtype):
        return NotImplemented
    return LogProbs(x.description)


def _negated(x: LazyLogits) -> Any:
    return replace(x.description, sign=-x.description.sign)


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
    return x.description.loss(target, ignore_index, label_smoothing, reduction, x.requires_grad).to(dtype)


def _gather(x: LazyLogits, dim: int, index: Tensor) -> Any:
    if dim not in (-1, x.dim() - 1) or index.shape != (*x.shape[:-1], 1):
        return NotImplemented
    return x.description.of_labels(index, 0.0, x.requires_grad).to(x.dtype)


def _chosen(x: LazyLogits, dim: int, index: Tensor) -> Any:
    if dim not in (-1, x.dim() - 1) or index.shape[:-1] != x.shape[:-1] or index.shape[-1] > MOST_CHOSEN:
        return NotImplemented
    return x.description.chosen(index, x.requires_grad).to(x.dtype)


def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    # In 16 bits torch rounds it, and whoever asks for it there wants that.
    if dim not in (-1, x.dim() - 1, (-1,), [-1]) or x.dtype.itemsize < 4:
        return NotImplemented
    total = x.description.logsumexp(x.requires_grad).to(x.dtype)
    return total.unsqueeze(-1) if keepdim else total


def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    """Text by text, as a loop over logits goes."""
    if dim != 0 or x.dim() < 3:
        return NotImplemented
    return tuple(x[i] for i in range(x.shape[0]))


def _sum(x: LazyLogits, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
    if dim not in (-1, x.dim() - 1):
        return NotImplemented
    labels = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    total = x.description.of_labels(labels, 1.0, x.requires_grad).to(dtype or x.dtype) * x.shape[-1]
    return total.unsqueeze(-1) if keepdim else total


LogProbs.steps = dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _negated)
LogProbs.results = {
    **dict.fromkeys((torch.gather, Tensor.gather), _gather),
    **dict.fromkeys((torch.sum, Tensor.sum), _sum),
}
Logits.steps = {
    Tensor.to: _cast,
    Tensor.float: _to_float,
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), _same),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    Tensor.__getitem__: _index,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), _add),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _tanh),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _scaled(torch.mul)),
    **dict.fromkeys(
        (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide), _scaled(torch.div)
    ),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
}
Logits.results = {
    F.cross_entropy: _cross_entropy,
    **dict.fromkeys((torch.gather, Tensor.gather), _chosen),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp), _logsumexp),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbind),
}
