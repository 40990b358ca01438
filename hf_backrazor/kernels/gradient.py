"""What stands around the integer product of a weight gradient: three operators, and what they call in the library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import check, load, primitive, threads_for
from .rows import CODINGS, DTYPES, address

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _IntegersArgs(ctypes.Structure):
    """`integers_args` in native.h."""

    _fields_ = (
        ("rows", _int),
        ("n", _int),
        ("bits", _int),
        ("table", _pointer),
        ("member", _pointer),
        ("fields", _pointer),
        ("fields_stride", _int),
        ("k", _int),
        ("coding", _int),
        ("index", _pointer),
        ("index_stride", _int),
        ("out", _pointer),
        ("threads", _int),
    )


class _RoundArgs(ctypes.Structure):
    """`round_args` in native.h."""

    _fields_ = (
        ("grad", _pointer),
        ("rows", _int),
        ("columns", _int),
        ("row_scale", _pointer),
        ("seed", ctypes.c_uint64),
        ("out", _pointer),
        ("scale", _pointer),
        ("sum", _pointer),
        ("threads", _int),
    )


class _GradientArgs(ctypes.Structure):
    """`gradient_args` in native.h."""

    _fields_ = (
        ("product", _pointer),
        ("scale", _pointer),
        ("grad", _pointer),
        ("rows", _int),
        ("columns", _int),
        ("n", _int),
        ("k", _int),
        ("coding", _int),
        ("value_dtype", _int),
        ("values", _pointer),
        ("index", _pointer),
        ("index_stride", _int),
        ("gamma", _pointer),
        ("beta", _pointer),
        ("grad_sum", _pointer),
        ("transposed", _int),
        ("threads", _int),
    )


def _fake_integers(fields, index, table, member, n, k, coding, bits) -> Tensor:
    return fields.new_empty((fields.shape[0], n), dtype=torch.int8)


def _fake_round_gradient(grad, row_scale, seed) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad, dtype=torch.int8), grad.new_empty(grad.shape[1]), grad.new_empty(grad.shape[1])


def _fake_finish_gradient(product, scale, grad, values, index, k, coding, gamma, beta, grad_sum, transposed) -> None:
    return None


@primitive(
    "integers(Tensor fields, Tensor? index, Tensor table, Tensor? member, int n, int k, str coding, int bits) "
    "-> Tensor",
    fake=_fake_integers,
)
def integers(
    fields: Tensor,
    index: Tensor | None,
    table: Tensor,
    member: Tensor | None,
    n: int,
    k: int,
    coding: str,
    bits: int,
) -> Tensor:
    """Coded rows to 8-bit integers, zero where an element is kept exactly.

    Args:
        fields: uint8 `(rows, code_bytes)`.
        index: uint8 `(rows, index_bytes)`: the places of the `k` kept in each row, in the given `coding`; or None.
        table: int8 `(members, 2 ** bits)`: what each code stands for.
        member: uint8 `(rows,)`: whose line of the table holds for a row; or None: the first for all.
        n: elements in a row.
        k, coding: see `index`.
        bits: of the codes, 1 to 4.

    Returns:
        int8 `(rows, n)`.
    """
    fields, table = fields.contiguous(), table.contiguous()
    index, member = (None if t is None else t.contiguous() for t in (index, member))
    out = fields.new_empty((fields.shape[0], n), dtype=torch.int8)
    arguments = _IntegersArgs(
        rows=fields.shape[0],
        n=n,
        bits=bits,
        table=table.data_ptr(),
        member=address(member),
        fields=fields.data_ptr(),
        fields_stride=fields.shape[1],
        k=k,
        coding=CODINGS[coding],
        index=address(index),
        index_stride=0 if index is None else index.shape[1],
        out=out.data_ptr(),
        threads=threads_for(out.numel()),
    )
    check(load().hf_backrazor_integers(ctypes.byref(arguments)))
    return out


@primitive(
    "round_gradient(Tensor grad, Tensor? row_scale, int seed) -> (Tensor, Tensor, Tensor)",
    fake=_fake_round_gradient,
)
def round_gradient(grad: Tensor, row_scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient to 8-bit integers, each column with its own scale, rounded at random so that the mean is exact.

    Args:
        grad: float32 `(rows, columns)`.
        row_scale: bfloat16 `(rows, 1)`: multiplied by first. Or None.
        seed: below 2^32; the same seed rounds in the same way.

    Returns:
        int8 `(rows, columns)`; float32 `(columns,)`: what a step of them stands for; float32 `(columns,)`: the sum of
        `grad` over its rows.
    """
    grad, row_scale = grad.contiguous(), None if row_scale is None else row_scale.contiguous()
    out, scale, total = _fake_round_gradient(grad, row_scale, seed)
    arguments = _RoundArgs(
        grad=grad.data_ptr(),
        rows=grad.shape[0],
        columns=grad.shape[1],
        row_scale=address(row_scale),
        seed=seed,
        out=out.data_ptr(),
        scale=scale.data_ptr(),
        sum=total.data_ptr(),
        threads=threads_for(grad.numel()),
    )
    check(load().hf_backrazor_round(ctypes.byref(arguments)))
    return out, scale, total


@primitive(
    "finish_gradient(Tensor(a!) product, Tensor scale, Tensor grad, Tensor? values, Tensor? index, int k, str coding, "
    "Tensor? gamma, Tensor? beta, Tensor? grad_sum, bool transposed) -> ()",
    fake=_fake_finish_gradient,
)
def finish_gradient(
    product: Tensor,
    scale: Tensor,
    grad: Tensor,
    values: Tensor | None,
    index: Tensor | None,
    k: int,
    coding: str,
    gamma: Tensor | None,
    beta: Tensor | None,
    grad_sum: Tensor | None,
    transposed: bool,
) -> None:
    """A weight gradient from its integer product, in place of it.

    (product scale + dY^T kept) gamma + grad_sum beta^T, where `kept` is the input with nothing but the elements that
    are kept exactly.

    Args:
        product: int32 `(columns, n)`; `(n, columns)` if `transposed`. Holds the bits of float32 afterwards.
        scale: float32 `(columns,)`.
        grad: dY, float32 `(rows, columns)`.
        values, index: what is kept of each row of the input, and where. Or None.
        k, coding: how many a row, and how their places are stored.
        gamma, beta: float32 `(n,)`, or None: 1, 0.
        grad_sum: float32 `(columns,)`: dY summed over rows; needed with `beta`.
        transposed: see `product`.
    """
    n, columns = product.shape if transposed else product.shape[::-1]
    scale, grad = scale.contiguous(), grad.contiguous()
    values, index, gamma, beta, grad_sum = (
        None if t is None else t.contiguous() for t in (values, index, gamma, beta, grad_sum)
    )
    arguments = _GradientArgs(
        product=product.data_ptr(),
        scale=scale.data_ptr(),
        grad=grad.data_ptr(),
        rows=grad.shape[0],
        columns=columns,
        n=n,
        k=k,
        coding=CODINGS[coding],
        value_dtype=0 if values is None else DTYPES[values.dtype],
        values=address(values),
        index=address(index),
        index_stride=0 if index is None else index.shape[1],
        gamma=address(gamma),
        beta=address(beta),
        grad_sum=address(grad_sum),
        transposed=transposed,
        threads=threads_for(product.numel()),
    )
    check(load().hf_backrazor_gradient(ctypes.byref(arguments)))
