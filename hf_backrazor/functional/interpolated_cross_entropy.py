"""The cross entropy of resized logits, band by band: the pixels' logits never exist whole.

Models for dense prediction compute logits at a quarter or less of the image's height and width and resize them to it
before the loss, which makes some hundred times the numbers of any other activation. Resizing is linear and goes along
rows and along columns: out = R x C^T, with matrices that the sizes alone determine.

With z the resized logits of a pixel, t its label, V classes with weights w, and e the label smoothing, its loss is
-sum_c q_c log softmax(z)_c for q_c = (1 - e) w_t [c = t] + e w_c / V, and its gradient by z is sum(q) softmax(z) - q.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import unset_fake_temporarily
from ..shapes_only import turns
from .differentiation import once_differentiable
from .labels import check_labels
from .precision import accumulate_dtype, without_autocast

# Resized logits in a band: 4 MiB in float32 on a CPU, near its cache.
BAND_NUMEL = {"cpu": 2**20}
BAND_NUMEL_ELSEWHERE = 2**26

# Modes that work on height and width one after the other.
MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


class Resizing(NamedTuple):
    """How logits become as large as labels; see `torch.nn.functional.interpolate`."""

    size: tuple[int, int]
    mode: str
    align_corners: bool | None


def interpolated_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    resizing: Resizing,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(interpolate(logits, ...), labels, ...)`, saving the gradient of the small logits alone.

    That gradient is exact, up to the order of summation, and is computed in the forward pass, while the resized logits
    are at hand; backward only scales it.

    Args:
        logits: `(batch, classes, height, width)`, float.
        labels: `(batch, *resizing.size)`, int64.
        resizing: from `(height, width)` to the labels' size; its mode is one of `MODES`.
        weight: `(classes,)`, or None: 1.
        ignore_index: see `torch.nn.functional.cross_entropy`.
        label_smoothing: see there.
        reduction: `"mean"` or `"sum"`, see there.

    Returns:
        The loss, a scalar in float32 or wider.

    Raises:
        ValueError: `labels` are not of the resized logits' size.
        IndexError: a label is neither a class nor `ignore_index`; on a GPU an assertion fails there instead.
    """
    if labels.shape != (logits.shape[0], *resizing.size):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}: expected {(logits.shape[0], *resizing.size)}, one for each "
            "pixel of the resized logits"
        )
    counted = labels != ignore_index
    check_labels(labels, logits.shape[1], counted)
    known = labels.where(counted, 0)
    dtype = accumulate_dtype(logits)
    each = counted.to(dtype) if weight is None else weight.detach().to(dtype)[known].where(counted, 0)
    total = _InterpolatedCrossEntropy.apply(logits, known, counted, each, resizing, weight, label_smoothing)
    return total / each.sum() if reduction == "mean" else total


class _InterpolatedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        counted: Tensor,
        each: Tensor,
        resizing: Resizing,
        weight: Tensor | None,
        label_smoothing: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        # Whatever autocast computes in, these sums are taken in `each.dtype`.
        with without_autocast(logits.device.type):
            total, grad = _total_and_gradient(
                logits, labels, counted, each, resizing, weight, label_smoothing, ctx.needs_input_grad[0]
            )
        if grad is not None:
            ctx.save_for_backward(grad.to(logits.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(grad.dtype), *(None,) * 6


def _total_and_gradient(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor,
    each: Tensor,
    resizing: Resizing,
    weight: Tensor | None,
    label_smoothing: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sum of all pixels' losses, and its gradient by the logits if that is needed."""
    batch, classes, height, width = logits.shape
    dtype = each.dtype
    rows = resizing_matrix(height, resizing.size[0], resizing, dtype, logits.device)
    columns = resizing_matrix(width, resizing.size[1], resizing, dtype, logits.device)
    smoothed = None
    if label_smoothing:
        smoothed = each.new_ones(classes) if weight is None else weight.detach().to(dtype)
        smoothed = (smoothed * (label_smoothing / classes)).unsqueeze(-1)
    grad = torch.empty_like(logits, dtype=dtype) if needs_grad else None
    total = each.new_zeros(())
    bands = list(_bands(logits.shape, resizing, logits.device.type))
    for sample in turns(range(batch), logits):
        # Rows come first: resizing them is one small product for all classes and columns, (rows, classes * width).
        small = logits[sample].detach().to(dtype).transpose(0, 1).reshape(height, -1)
        small_grad = torch.zeros_like(small)
        for band, source in turns(bands, logits):
            part = rows[band, source]
            z = (part @ small[source]).view(-1, width) @ columns.t()
            z = z.view(part.shape[0], classes, -1)
            label = labels[sample, band].unsqueeze(1)
            on_label = (1 - label_smoothing) * each[sample, band].unsqueeze(1)
            mass = on_label
            if smoothed is not None:
                inside = counted[sample, band].unsqueeze(1)
                mass = mass + inside * smoothed.sum()
                total -= ((smoothed * z).sum(1, keepdim=True) * inside).sum()
            total -= (on_label * z.gather(1, label)).sum()
            greatest = z.amax(1, keepdim=True)
            z.sub_(greatest).exp_()
            normaliser = z.sum(1, keepdim=True)
            total += ((greatest + normaliser.log()) * mass).sum()
            if grad is None:
                continue
            z.mul_(mass / normaliser).scatter_add_(1, label, -on_label)
            if smoothed is not None:
                z.sub_(smoothed * inside)
            by_rows = z.view(-1, z.shape[-1]) @ columns
            small_grad[source].addmm_(part.t(), by_rows.view(part.shape[0], -1))
        if grad is not None:
            grad[sample] = small_grad.view(height, classes, width).transpose(0, 1)
    return total, grad


@lru_cache(maxsize=32)
def resizing_matrix(before: int, after: int, resizing: Resizing, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix `(after, before)` that resizes one dimension: what torch makes of each unit vector."""
    # A real one, also where an estimate on fake tensors asks for it first, and one that training can use.
    with torch.inference_mode(False), unset_fake_temporarily(), torch.no_grad():
        unit = torch.eye(before, dtype=dtype, device=device)[None, None]
        return F.interpolate(unit, (after, before), mode=resizing.mode, align_corners=resizing.align_corners)[0, 0]


def _bands(shape: torch.Size, resizing: Resizing, device: str) -> Iterator[tuple[slice, slice]]:
    """Rows of the result, and the rows of the logits that they are computed from."""
    _, classes, height, _ = shape
    after, width = resizing.size
    bounds = _sources(height, after, resizing)
    numel = BAND_NUMEL.get(device, BAND_NUMEL_ELSEWHERE)
    step = max(1, numel // max(1, classes * width))
    for start in range(0, after, step):
        stop = min(start + step, after)
        firsts, lasts = zip(*bounds[start:stop], strict=True)
        yield slice(start, stop), slice(min(firsts), max(lasts))


@lru_cache(maxsize=32)
def _sources(before: int, after: int, resizing: Resizing) -> tuple[tuple[int, int], ...]:
    """For each row of the result, the first of the rows that it is computed from, and the last and one more."""
    matrix = resizing_matrix(before, after, resizing, torch.float32, torch.device("cpu"))
    with unset_fake_temporarily():
        used = (matrix != 0).to(torch.int8)
        first = used.argmax(1).tolist()
        last = (before - used.flip(1).argmax(1)).tolist()
    return tuple(zip(first, last, strict=True))
