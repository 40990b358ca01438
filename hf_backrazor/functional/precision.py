"""The dtype that an operator computes in, and autocast carried from forward to backward."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype that a matrix product of `x` runs in: autocast's where it is on, else the tensor's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def current_autocast(device_type: str) -> AbstractContextManager:
    """A context that puts back the autocast state of this moment; backward runs outside of the forward's."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float32 for 16-bit tensors, the tensor's own dtype otherwise."""
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype
