"""`norm_backward` of `kernels.norm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import index_form
from .tiles import CODINGS, EXACT, tile_of, unpack_tile

# Tiles whose share of dgamma and dbeta one program sums.
TILES = 4


@triton.jit
def norm_backward_kernel(
    grad,
    rstd,
    gamma,
    values,
    index,
    scale,
    fields,
    out,
    grad_gamma,
    grad_beta,
    rows,
    index_stride,
    fields_stride,
    n: tl.constexpr,
    k: tl.constexpr,
    CENTRED: tl.constexpr,
    CODING: tl.constexpr,
    ENDS: tl.constexpr,
    END_BYTES: tl.constexpr,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROTATED: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    gammas = tl.zeros([BLOCK], tl.float32)
    betas = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        row = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)
        live = row < rows
        inside = live[:, None] & (column < n)[None, :]
        at = row.to(tl.int64)[:, None] * n + column[None, :]
        # Kept elements find their places in memory only: where the result will be.
        unpack_tile(
            out,
            values,
            index,
            scale,
            fields,
            None,
            1,
            0,
            row,
            live,
            index_stride,
            fields_stride,
            n,
            k,
            CODING,
            ENDS,
            END_BYTES,
            KEPT,
            BITS,
            LEVELS,
            ROTATED,
            False,
            0,
            BLOCK,
        )
        tl.debug_barrier()
        x_hat = tl.load(out + at, mask=inside, other=0)
        tl.debug_barrier()
        dy = tl.load(grad + at, mask=inside, other=0)
        gammas += tl.sum(dy * x_hat, 0)
        betas += tl.sum(dy, 0)
        if gamma is not None:
            dy *= tl.load(gamma + column, mask=column < n, other=0)[None, :]
        dx = dy - x_hat * (tl.sum(dy * x_hat, 1) / n)[:, None]
        if CENTRED:
            dx -= (tl.sum(dy, 1) / n)[:, None]
        tl.store(out + at, dx * tl.load(rstd + row, mask=live, other=0)[:, None], mask=inside)
    tl.store(grad_gamma + program * n + column, gammas, mask=column < n)
    tl.store(grad_beta + program * n + column, betas, mask=column < n)


def norm_backward(
    grad: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    centred: bool,
    values: Tensor | None,
    index: Tensor | None,
    scale: Tensor | None,
    fields: Tensor | None,
    k: int,
    coding: str,
    bits: int,
    levels: Sequence[float],
    rotated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.norm.norm_backward`."""
    rows, n = grad.shape
    grad, rstd = grad.contiguous(), rstd.contiguous()
    gamma, values, index, scale, fields = (
        None if t is None else t.contiguous() for t in (gamma, values, index, scale, fields)
    )
    index, index_stride, ends, end_bytes = index_form(index, n, k, coding)
    tile = tile_of(n)
    programs = triton.cdiv(rows, tile["ROWS"] * TILES)
    out = torch.empty_like(grad)
    sums = grad.new_empty(2, programs, n)
    with torch.cuda.device_of(grad):
        norm_backward_kernel[(programs,)](
            grad,
            rstd,
            gamma,
            values,
            index,
            scale,
            fields,
            out,
            sums[0],
            sums[1],
            rows,
            index_stride,
            0 if fields is None else fields.shape[-1],
            n=n,
            k=k,
            CENTRED=centred,
            CODING=CODINGS[coding],
            ENDS=ends,
            END_BYTES=end_bytes,
            KEPT=triton.next_power_of_2(max(k, 1)),
            BITS=bits,
            LEVELS=tuple(levels),
            ROTATED=rotated,
            TILES=TILES,
            **tile,
            **EXACT,
        )
    grad_gamma, grad_beta = sums.sum(1).unbind()
    return out, grad_gamma.clone(), grad_beta.clone()
