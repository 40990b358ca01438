"""Which elements are kept exactly: the `k` greatest magnitudes of a set, and never one more or less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INTEGER_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_count(n: int, sparsity: float) -> int:
    """How many of `n` elements are kept exactly: `n - floor(n * sparsity)`, so at least one below sparsity 1."""
    # Rounded first: 100 * 0.57 is 56.99999999999999 in binary.
    return n - math.floor(round(n * sparsity, 6))


def magnitude_order(x: Tensor) -> Tensor:
    """Integers that order the elements of `x` by magnitude: `|x|`'s bit pattern, which puts NaN above infinity."""
    return x.abs().view(_INTEGER_OF_WIDTH[x.element_size()])


def topk_mask(x: Tensor, k: int) -> Tensor:
    """Mark the `k` elements of greatest magnitude in each row.

    Among equal magnitudes the lowest index is kept, so the result depends on nothing but `x`. NaN counts as greater
    than infinity: what would poison a dense gradient is kept and poisons the pruned one.

    Args:
        x: floating point, `(sets, n)`.
        k: between 0 and `n`.

    Returns:
        bool, `(sets, n)`, with exactly `k` true elements a row.
    """
    sets, n = x.shape
    if k >= n:
        return torch.ones(sets, n, dtype=torch.bool, device=x.device)
    if k == 0 or sets == 0:
        return torch.zeros(sets, n, dtype=torch.bool, device=x.device)
    order = magnitude_order(x)
    threshold = order.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = order > threshold
    tied = order == threshold
    vacant = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    tied &= tied.cumsum(-1, dtype=torch.int32) <= vacant
    return above.logical_or_(tied)
