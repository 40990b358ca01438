"""Compile every kernel for GPUs in the forms that a fine-tuning run needs, without one: to machine code, not run.

    python tests/compile_triton.py

The functions are called with CPU tensors, and a driver that only knows what to compile for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
from test_triton import MODULES
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hf_backrazor.functional.activation import GELU, cell_tables
from hf_backrazor.packing import (
    PackSpec,
    decode_cells,
    decode_cells_as_integers,
    encode_cells,
    pack,
    packed_norm_gradients,
    weight_gradient,
)

compiled: dict[str, int] = {}


class Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.target.arch, 10)


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.asm["cubin"], self.__name__
    compiled[self.__name__] = compiled.get(self.__name__, 0) + 1
    return kernel


launch = JITFunction.run


class Compile(TorchDispatchMode):
    """Compile each operator that is called, for its arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hf_backrazor":
            name = func._opname
            module = importlib.import_module(f"hf_backrazor.kernels.triton.{MODULES[name]}")
            again = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            getattr(module, name)(*again)
        return func(*args, **(kwargs or {}))


def main() -> None:
    JITFunction.run = compile_only
    for arch in (80, 90):
        triton.runtime.driver.set_active(Target(GPUTarget("cuda", arch, 32)))
        with Compile():
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(40, 768).to(dtype)
                for spec in (
                    PackSpec(0.99, bits=2),
                    PackSpec(0.99, bits=3),
                    PackSpec(0.97),
                    PackSpec(0.8, bits=1),
                    PackSpec(0.995),
                    PackSpec(0.99, bits=3, rotated=True),
                ):
                    packed = pack(x, spec)
                    packed.unpack()
                    packed.layout.add_to(packed.parts, torch.zeros(x.shape), -1)
                heads = torch.randn(2, 3, 9, 64).to(dtype)
                pack(heads.transpose(1, 2), PackSpec(0.99, bits=4, levels="even", centred=True)).unpack()
                pack(heads.transpose(1, 2), PackSpec(0.99, bits=4, centred=True, rotated=True)).unpack()
                # Blocks of several sizes; rows that take a block of threads each.
                pack(x[:, :203], PackSpec(1.0, bits=2, rotated=True)).unpack()
                pack(torch.randn(2, 11008).to(dtype), PackSpec(0.99, bits=3, rotated=True)).unpack()
                pack(heads, PackSpec(0.9, "sample", value_dtype="float16")).unpack()
                cells, derivatives, _ = cell_tables(GELU, 4)
                codes = encode_cells(x, cells)
                decode_cells(codes, 768, cells, derivatives, dtype)
                decode_cells_as_integers(codes, 768, cells, derivatives, None)
            x, grad, gamma, rstd = torch.randn(40, 768), torch.randn(40, 768), torch.randn(768), torch.rand(40, 1)
            for centred in (True, False):
                packed = pack(x, PackSpec(0.99, bits=3), x.mean(-1, keepdim=True) if centred else None, rstd)
                packed_norm_gradients(grad, packed.layout, packed.parts, rstd, gamma, centred)
                turned = pack(x, PackSpec(0.99, bits=3, rotated=True))
                packed_norm_gradients(grad, turned.layout, turned.parts, rstd, gamma, centred)
                integers = packed.layout.integers(packed.parts)
                weight_gradient(grad, integers, gamma, gamma if centred else None, centred, 2**32 - 1)
            integers = pack(x, PackSpec(0.8, bits=2)).layout.integers(pack(x, PackSpec(0.8, bits=2)).parts)
            weight_gradient(grad, integers, None, None, False, 1)
            # Numbers that are 1 become constants.
            row = pack(x[:1], PackSpec(0.99, bits=2))
            row.unpack()
            weight_gradient(grad[:1], row.layout.integers(row.parts), None, None, False, 0)
    for name, count in sorted(compiled.items()):
        print(name, count)


if __name__ == "__main__":
    main()
