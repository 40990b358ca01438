"""The dtype that an operator computes in, and autocast carried from forward to backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype that a matrix product of `x` runs in: autocast's where it is on, else the tensor's own."""
    if autocast_is_on(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def current_autocast(device_type: str) -> AbstractContextManager:
    """A context that puts back the autocast state of this moment; backward runs outside of the forward's."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which tensors compute in their own dtypes."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for devices of this type."""
    # Asking for a device without autocast ("meta") is an error.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float32 for 16-bit tensors, the tensor's own dtype otherwise."""
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype
