"""The compiled library, and Triton: found, loaded once, or missing without harm."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

DISABLE = "HF_BACKRAZOR_NATIVE"

_disabled = 0


def available() -> bool:
    """Whether the compiled primitives are to be used."""
    return not _disabled and load() is not None


def triton_available() -> bool:
    """Whether the primitives in Triton are to be used."""
    return not _disabled and _has_triton()


@cache
def _has_triton() -> bool:
    return os.environ.get(DISABLE) != "0" and importlib.util.find_spec("triton") is not None


def on_cuda(module: str, name: str) -> Callable[..., Any]:
    """An operator for CUDA tensors: `name` in `kernels.triton.module`, imported with Triton when it is first called."""

    def call(*args: object) -> object:
        return getattr(importlib.import_module(f"{__package__}.triton.{module}"), name)(*args)

    return call


@contextmanager
def torch_only() -> Iterator[None]:
    """Run the torch code of every primitive, as where nothing could be compiled."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None: it was not built, cannot be loaded, or is switched off by `HF_BACKRAZOR_NATIVE=0`."""
    if os.environ.get(DISABLE) == "0":
        return None
    reason = "it was not compiled when the package was installed"
    spec = importlib.util.find_spec("hf_backrazor.kernels._native")
    if sys.byteorder == "little" and spec is not None and spec.origin:
        try:
            _share_openmp()
            return ctypes.CDLL(spec.origin)
        except OSError as error:
            reason = str(error)
    warnings.warn(
        f"hf_backrazor's compiled primitives are not available ({reason}); the same is done in torch, slower. With a C "
        "compiler at hand, reinstalling the package brings them.",
        stacklevel=2,
    )
    return None


def _share_openmp() -> None:
    """Let the library run on torch's own threads.

    Wheels of torch bring an OpenMP runtime under a name of their own. A second one would wait, spinning, on the same
    cores; symbols that are loaded globally before take the place of its own.
    """
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)


def threads_for(numel: int) -> int:
    """Threads that work on so many elements: torch's number, but none for less than 16384 elements."""
    return max(1, min(torch.get_num_threads(), numel // 16384))


def check(status: int) -> None:
    """Raise what a call of the library reports."""
    if status:
        raise MemoryError("no memory for the rows that are being packed or unpacked")
