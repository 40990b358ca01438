"""Tensors of an estimate, of which there are only shapes: loops over slices of them need not go on to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from .compat import FakeTensor, FakeTensorMode

_Slice = TypeVar("_Slice")


class ShapesOnly(FakeTensorMode):
    """The fake tensors of estimates.

    `torch.compile` traces with fake tensors as well, and must see every slice. It has a mode of its own.
    """


def is_shape_only(x: Tensor) -> bool:
    """Whether `x` is a tensor of an estimate."""
    return isinstance(x, FakeTensor) and isinstance(x.fake_mode, ShapesOnly)


def turns(slices: Sequence[_Slice], x: Tensor) -> Sequence[_Slice]:
    """The turns of a loop over slices of `x`: all `slices`, or the first two if `x` is a tensor of an estimate.

    From its second turn on, a loop holds the same: what it is making, and what the turn before has left. So two show
    its peak. However small fake tensors are, an operator on them takes 0.1 ms and more; in a step of Llama-3-8B on 4096
    tokens there would be 220,000.

    What the loop makes must have its shape, whether it has gone through all slices or not: a sum, or a tensor that was
    there before. For results that are put together there is `packing.layout.in_slices`.
    """
    return slices[:2] if is_shape_only(x) else slices
