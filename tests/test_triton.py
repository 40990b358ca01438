"""What the kernels for GPUs store is what the CPU's primitives store, to the bit. They run in Triton's interpreter.

Every operator that packing calls on a CPU is called in Triton once more, with the same arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_backrazor
from hf_backrazor.functional.activation import GELU, SILU, cell_tables
from hf_backrazor.kernels.library import load
from hf_backrazor.packing import (
    PackSpec,
    decode_cells,
    decode_cells_as_integers,
    encode_cells,
    pack,
    packed_norm_gradients,
    weight_gradient,
)

pytestmark = [
    pytest.mark.skipif(load() is None, reason="nothing was compiled here"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

MODULES = {
    "pack": "rows",
    "unpack": "rows",
    "accumulate": "rows",
    "encode_cells": "cells",
    "decode_cells": "cells",
    "norm_backward": "norm",
    "integers": "gradient",
    "round_gradient": "gradient",
    "finish_gradient": "gradient",
}


class Repeat(TorchDispatchMode):
    """Call each operator in Triton as well, and compare: integers to the bit, floats as the operator allows."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "hf_backrazor":
            return func(*args, **(kwargs or {}))
        name = func._opname
        self.called.add(name)
        module = importlib.import_module(f"hf_backrazor.kernels.triton.{MODULES[name]}")
        # Some of the operators change an argument.
        again = [arg.clone() if isinstance(arg, Tensor) and name in IN_PLACE else arg for arg in args]
        result = func(*args, **(kwargs or {}))
        repeated = getattr(module, name)(*again)
        if name == "finish_gradient":
            compare(name, again[0].view(torch.float32), args[0].view(torch.float32))
        elif name == "accumulate":
            compare(name, again[0], args[0])
        elif isinstance(result, Tensor):
            compare(name, repeated, result)
        else:
            for number, (found, expected) in enumerate(zip(repeated, result, strict=True)):
                compare(f"{name}[{number}]", found, expected)
        return result


IN_PLACE = {"finish_gradient", "accumulate"}
SUMS = {"norm_backward[0]", "norm_backward[1]", "norm_backward[2]", "round_gradient[2]", "finish_gradient"}


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    if what in SUMS:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item() + 1e-30)
    elif expected.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan()), what
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), what
    else:
        assert torch.equal(found, expected), what


def repeat(call: Callable[[], object], *operators: str) -> None:
    with Repeat() as mode:
        call()
    assert mode.called == set(operators)


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "tied":
        x = x.mul(2).round()
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "wild":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-42, 3e38, -3e-39])
        place = torch.rand(shape, generator=generator) < 0.05
        x = torch.where(place, odd[torch.randint(0, 7, shape, generator=generator)], x)
    x = x.to(dtype)
    # Some processors give a NaN a sign when they round it, and the interpreter takes it away again.
    return x.masked_fill_(x.isnan(), torch.nan)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.one_of(st.integers(1, 130), st.sampled_from([257, 777])))


@settings(max_examples=40, deadline=None)
@given(
    spec=st.builds(
        PackSpec,
        sparsity=st.sampled_from([0.3, 0.9, 0.97, 0.99, 1.0]),
        bits=st.sampled_from([0, 1, 2, 3, 4]),
        value_dtype=st.sampled_from(["auto", "float32", "float16"]),
        levels=st.sampled_from(["gaussian", "even"]),
        centred=st.booleans(),
    ),
    rotated=st.booleans(),
    shape=shapes,
    kind=st.sampled_from(["normal", "tied", "zero", "wild"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_packs_and_unpacks(
    spec: PackSpec, rotated: bool, shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int
) -> None:
    if rotated and spec.bits:
        spec = replace(spec, rotated=True)
    # Which of several NaNs a difference takes its payload from is left to the compiler.
    x = make("tied" if spec.centred and kind == "wild" else kind, shape, dtype, seed)
    with Repeat():
        packed = pack(x, spec)
        packed.unpack()
        if packed.layout.is_compiled(packed.parts, torch.float32):
            packed.layout.add_to(packed.parts, torch.randn(x.shape), -1 if seed % 2 else 1)


def test_packs_samples_and_views() -> None:
    x = torch.randn(2, 3, 4, 64)
    repeat(lambda: pack(x, PackSpec(0.9, "sample", value_dtype="float16")).unpack(), "pack", "unpack")
    repeat(lambda: pack(x.permute(2, 0, 1, 3), PackSpec(0.9, bits=4)).unpack(), "pack", "unpack")


@pytest.mark.parametrize("n", [1, 2, 16, 31, 64, 127, 128, 129, 255, 576, 768])
def test_rotates(n: int) -> None:
    x = torch.randn(5, n)
    for bits in (1, 4):
        repeat(lambda bits=bits: pack(x, PackSpec(1.0, bits=bits, rotated=True)).unpack(), "pack", "unpack")


@pytest.mark.parametrize(
    "spec", [PackSpec(0.97, bits=3), PackSpec(0.9), PackSpec(0.99, bits=2), PackSpec(0.97, bits=3, rotated=True)]
)
@pytest.mark.parametrize("centred", [True, False])
def test_norms(spec: PackSpec, centred: bool) -> None:
    x, grad, gamma = torch.randn(70, 203), torch.randn(70, 203), torch.randn(203) if centred else None
    mean, rstd = x.mean(-1, keepdim=True) if centred else None, torch.rand(70, 1) + 0.5

    def call() -> None:
        packed = pack(x, spec, mean, rstd)
        packed_norm_gradients(grad, packed.layout, packed.parts, rstd, gamma, centred)

    repeat(call, "pack", "norm_backward")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rule", [GELU, SILU])
def test_cells(bits: int, rule: object) -> None:
    cells, derivatives, values = cell_tables(rule, bits)
    scales = torch.arange(-17, 10).exp2().unsqueeze(1)
    for n in (1, 64, 301):
        for dtype in (torch.float32, torch.bfloat16):
            wild = make("wild", (27, n), torch.float32, 0)
            x = torch.cat([wild, wild * scales]).to(dtype)
            x = torch.cat([x, x], 1)[:, n // 2 : n // 2 + n]  # rows apart

            def call(x: Tensor = x, dtype: torch.dtype = dtype, n: int = n) -> None:
                codes = encode_cells(x, cells)
                decode_cells(codes, n, cells, derivatives, dtype)
                decode_cells_as_integers(codes, n, cells, values, None)

            repeat(call, "encode_cells", "decode_cells", "integers")


def test_rows_at_the_bounds_between_divisions_take_the_same() -> None:
    cells, _, _ = cell_tables(GELU, 4)
    bounds = cells.bounds.repeat_interleave(3).unsqueeze(1)
    x = torch.randn(len(bounds), 300, dtype=torch.float64)
    x *= (bounds / x.square().mean(1, keepdim=True)).sqrt()
    x *= torch.tensor([1 - 1e-6, 1, 1 + 1e-6]).repeat(len(cells.bounds)).unsqueeze(1)
    repeat(lambda: encode_cells(x.float(), cells), "encode_cells")


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 300)),
    columns=st.integers(2, 90),
    sparsity=st.sampled_from([0.7, 0.9, 0.99, 1.0]),
    bits=st.sampled_from([1, 2, 3, 4]),
    transposed=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_weight_gradients(shape, columns, sparsity, bits, transposed, affine, seed) -> None:
    packed = pack(torch.randn(shape), PackSpec(sparsity, bits=bits))
    grad = torch.randn(shape[0], columns)
    gamma, beta = torch.randn(2, shape[1]) if affine else (None, None)
    with Repeat() as mode:
        weight_gradient(grad, packed.layout.integers(packed.parts), gamma, beta, transposed, seed)
    assert mode.called == {"integers", "round_gradient", "finish_gradient"}


@pytest.mark.slow
def test_compiles_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does. This needs no GPU, but a process that does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parent / "compile_triton.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = {line.split()[0] for line in run.stdout.splitlines()}
    written = set()
    for source in (Path(hf_backrazor.__file__).parent / "kernels" / "triton").glob("*.py"):
        written |= set(re.findall(r"def (\w+_kernel)\(", source.read_text(encoding="utf-8")))
    assert kernels == written
