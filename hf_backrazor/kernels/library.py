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
from functools import cache, update_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import is_dispatcher_watched

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


@contextmanager
def torch_only() -> Iterator[None]:
    """Run the torch code of every primitive, as where nothing could be compiled."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


class Primitive:
    """A function of tensors in compiled code, which is an operator of torch as well: `torch.ops.hf_backrazor`.

    As an operator it has a name in profiles and traces, runs on fake tensors, and finds the code for its device. The
    way there takes some 7 microseconds a call. On a CPU, where nobody looks, the function is called itself.

    Args:
        cpu: the function, of CPU tensors. Its first argument that is not None is a tensor.
        schema: of the operator, as `torch.library` takes it.
        fake: what makes results of the same shape, without values.
        cuda: whether `kernels.triton` has a function of the same name, in a module of the same name.
    """

    def __init__(self, cpu: Callable[..., Any], schema: str, fake: Callable[..., Any], cuda: bool) -> None:
        update_wrapper(self, cpu)
        self._cpu = cpu
        name = cpu.__name__
        _operators.define(schema)
        _operators.impl(name, cpu, "CPU")
        if cuda:
            _operators.impl(name, self._triton, "CUDA")
        torch.library.register_fake(f"hf_backrazor::{name}", fake)
        self._operator = getattr(torch.ops.hf_backrazor, name)

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        first = next(x for x in args if x is not None)
        if type(first) in (Tensor, nn.Parameter) and first.is_cpu and not is_dispatcher_watched():
            return self._cpu(*args)
        return self._operator(*args)

    def _triton(self, *args: Any) -> Any:
        """The function for CUDA tensors, imported with Triton when it is first called."""
        module = importlib.import_module(f"{__package__}.triton.{self._cpu.__module__.rpartition('.')[2]}")
        return getattr(module, self._cpu.__name__)(*args)


def primitive(schema: str, fake: Callable[..., Any], cuda: bool = True) -> Callable[[Callable[..., Any]], Primitive]:
    """Make a primitive of a function (see `Primitive`)."""
    return lambda cpu: Primitive(cpu, schema, fake, cuda)


_operators = torch.library.Library("hf_backrazor", "DEF")


@cache
def load() -> ctypes.CDLL | Any:  # who calls its functions knows that it is there
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
