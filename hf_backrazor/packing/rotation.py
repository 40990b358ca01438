"""Rows turned so that all of their elements are alike: fixed random signs, and the Walsh-Hadamard transform in blocks.

What is left of a row of activations without its outliers still has columns of different size, or skewed values. Turned,
every element is a sum of a whole block with random signs, near to a Gaussian whatever the row was, which is what the
Lloyd-Max levels are made for; and the error of a code is spread over the block again when it is turned back.
(S. Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021; A. Suresh et al., "Distributed Mean
Estimation with Limited Communication", ICML 2017.)

The order of all additions is part of the definition: the kernels give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ..compat import unset_fake_temporarily

BLOCK = 128

# The first 128 binary places of pi: the lowest bit is the sign of a block's first element, 1 for minus.
SIGNS = 0x243F6A8885A308D313198A2E03707344


def rotate(x: Tensor) -> Tensor:
    """Turn the rows of `x`, float32 or float64 `(rows, n)`: an orthonormal map, that `unrotate` undoes.

    Blocks have `BLOCK` columns; what is left at the end is in blocks of the powers of two that it consists of, greatest
    first. Of each block: elements times their signs, the butterflies, and a multiplication by `size ** -0.5`.
    """
    return _of_blocks(x, lambda block, signs, factor: _butterflies(block * signs).mul_(factor))


def unrotate(x: Tensor) -> Tensor:
    """The rows that `rotate` turned."""
    return _of_blocks(x, lambda block, signs, factor: _butterflies(block).mul_(factor).mul_(signs))


def _of_blocks(x: Tensor, turn: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    turned = []
    for start, count, size in _blocks(x.shape[1]):
        blocks = x[:, start : start + count * size].reshape(x.shape[0], count, size)
        turned.append(turn(blocks, _signs(size, x.dtype, x.device), size**-0.5).view(x.shape[0], count * size))
    return torch.cat(turned, 1) if turned else x.clone()


def _blocks(n: int) -> Iterator[tuple[int, int, int]]:
    """Where blocks of a size begin in a row, how many there are, and their size."""
    start, size = 0, BLOCK
    while start < n:
        if count := (n - start) // size:
            yield start, count, size
        start += count * size
        size //= 2


def _butterflies(x: Tensor) -> Tensor:
    """Sums and differences of elements half a block apart, a quarter, and so on, of blocks in the last dimension."""
    *others, size = x.shape
    apart = size // 2
    while apart:
        first, second = x.view(*others, size // (2 * apart), 2, apart).unbind(-2)
        x = torch.stack([first + second, first - second], -2)
        apart //= 2
    return x.view(*others, size)


@lru_cache(maxsize=64)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The signs of a block's first elements, 1 or -1: `(size,)`."""
    # Real tables, also where an estimate asks for one first.
    with torch.inference_mode(False), unset_fake_temporarily():
        return torch.tensor([-1.0 if SIGNS >> i & 1 else 1.0 for i in range(size)], dtype=dtype, device=device)
