"""Padding with zeros: what consumes the result restores it from what the operator before the padding saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..packing import Packed
from .layouts import PaddedLayout
from .sharing import note_origin, origin_of


def zero_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """`torch.nn.functional.pad` with zeros; its gradient needs nothing, so nothing is saved.

    Args:
        x: `(batch, channels, *spatial)`, float.
        padding: elements before and after, for the last dimension first; negative ones cut off. Spatial dimensions
            alone.
    """
    y = F.pad(x, padding)
    origin = origin_of(x)
    if origin is not None:
        spatial = tuple(x.shape[2:])
        maps = origin.layout.regrouped(origin.parts, (x.shape[0] * x.shape[1], x.shape[2:].numel()))
        if maps is not None:
            note_origin(y, Packed(PaddedLayout(maps.layout, y.shape, spatial, tuple(padding)), maps.parts))
    return y
