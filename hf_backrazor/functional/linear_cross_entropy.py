"""A linear layer and the cross entropy of its output, tile by tile: the logits never exist whole.

With z = f(h W^T + b) the logits, t the label, e the label smoothing and V the number of classes, a token's loss is
logsumexp(z) - (1 - e) z_t - e mean(z), and its gradient by z is softmax(z) - (1 - e) onehot(t) - e / V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import is_traced
from ..shapes_only import turns
from .differentiation import once_differentiable
from .labels import check_labels
from .precision import accumulate_dtype, current_autocast
from .traced import once_more

# Logits in a tile: 16 MiB in float32 on a CPU. A tile spans all tokens where it can, so that each part of the weight
# is read, and each part of its gradient written, once.
TILE_NUMEL = {"cpu": 2**22}
TILE_NUMEL_ELSEWHERE = 2**26
MIN_CLASSES = 1024


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    elementwise: Callable[[Tensor], Tensor] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(elementwise(linear(hidden, weight, bias)), labels)` in little memory.

    All gradients are exact: the logits are computed once more in backward.

    Args:
        hidden: `(tokens, features)`, float.
        weight: `(classes, features)`.
        bias: `(classes,)` or None.
        labels: `(tokens,)`, int64.
        elementwise: what happens to the logits before the loss, such as a soft cap; None: nothing. It lives as long as
            the loss's graph.
        ignore_index: see `torch.nn.functional.cross_entropy`.
        label_smoothing: see there.
        reduction: see there.

    Returns:
        The loss, in float32 or wider: a scalar, or `(tokens,)` for the reduction `"none"`.

    Raises:
        IndexError: a label is neither a class nor `ignore_index`; on a GPU an assertion fails there instead.
    """
    check_labels(labels, weight.shape[0], labels != ignore_index)
    losses = _LinearCrossEntropy.apply(hidden, weight, bias, labels, elementwise, ignore_index, label_smoothing)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        elementwise: Callable[[Tensor], Tensor] | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.elementwise, ctx.label_smoothing = elementwise, label_smoothing
        ctx.autocast = current_autocast(hidden.device.type)
        dtype = accumulate_dtype(hidden)
        logsumexp = hidden.new_full(labels.shape, -torch.inf, dtype=dtype)
        target, total = torch.zeros_like(logsumexp), torch.zeros_like(logsumexp)
        for tokens, classes in _tiles(hidden, weight):
            z = _linear(hidden, weight, bias, tokens, classes)
            z = (z if elementwise is None else elementwise(z)).to(dtype)
            inside, place = _place(labels[tokens], classes)
            target[tokens] += z.gather(-1, place).squeeze(-1).where(inside, 0)
            if label_smoothing:
                total[tokens] += z.sum(-1)
            logsumexp[tokens] = torch.logaddexp(logsumexp[tokens], z.logsumexp(-1))
        counted = labels != ignore_index
        ctx.save_for_backward(hidden, weight, bias, labels, logsumexp, counted)
        losses = logsumexp - (1 - label_smoothing) * target
        if label_smoothing:
            losses -= label_smoothing / weight.shape[0] * total
        return losses.where(counted, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, logsumexp, counted = ctx.saved_tensors
        hidden = once_more(hidden) if is_traced() else hidden
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        smoothing = ctx.label_smoothing
        upstream = grad_output.where(counted, 0)
        dtype = accumulate_dtype(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        for tokens, classes in _tiles(hidden, weight):
            with ctx.autocast:
                logits = _linear(hidden, weight, bias, tokens, classes)
            z = logits
            if ctx.elementwise is not None:
                logits.requires_grad_()
                with torch.enable_grad():
                    z = ctx.elementwise(logits)
            # Fresh, unless it is what `elementwise` has to differentiate: then a copy.
            grad = z.detach().to(dtype, copy=ctx.elementwise is not None)
            grad.sub_(logsumexp[tokens].unsqueeze(-1)).exp_()
            if smoothing:
                grad -= smoothing / weight.shape[0]
            inside, place = _place(labels[tokens], classes)
            grad.scatter_add_(-1, place, inside.to(dtype).mul_(smoothing - 1).unsqueeze(-1))
            grad *= upstream[tokens].unsqueeze(-1)
            grad = grad.to(z.dtype)
            if ctx.elementwise is not None:
                (grad,) = torch.autograd.grad(z, logits, grad)
            if grad_hidden is not None:
                grad_hidden[tokens] += grad @ weight[classes].to(grad.dtype)
            if grad_weight is not None:
                part = grad.t() @ hidden[tokens].to(grad.dtype)
                # The tiles of the first tokens come first.
                if tokens.start == 0:
                    grad_weight[classes] = part
                else:
                    grad_weight[classes] += part
            if grad_bias is not None:
                grad_bias[classes] += grad.sum(0)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _tiles(hidden: Tensor, weight: Tensor) -> Sequence[tuple[slice, slice]]:
    """Slices of tokens and of classes that together cover all logits; in an estimate, the first ones (see `turns`)."""
    tokens, classes = hidden.shape[0], weight.shape[0]
    numel = TILE_NUMEL.get(hidden.device.type, TILE_NUMEL_ELSEWHERE)
    wide = min(classes, max(MIN_CLASSES, numel // max(tokens, 1)))
    high = max(1, numel // wide)
    tiles = [
        (slice(first, min(first + high, tokens)), slice(start, min(start + wide, classes)))
        for first in range(0, tokens, high)
        for start in range(0, classes, wide)
    ]
    return turns(tiles, hidden)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: slice, classes: slice) -> Tensor:
    return F.linear(hidden[tokens], weight[classes], None if bias is None else bias[classes])


def _place(labels: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Which of the labels lie in `classes`, and where there, `(tokens, 1)`; 0 for the others."""
    inside = (labels >= classes.start) & (labels < classes.stop)
    return inside, (labels - classes.start).where(inside, 0).unsqueeze(-1)
