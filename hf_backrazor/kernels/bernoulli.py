"""Bernoulli numbers on a CPU: those that torch would draw from its generator, to the bit, in a sixth of the time.

torch draws them one after the other, at 6 to 8 ns each, which is a tenth of a GPT-2 training step. Here the Mersenne
twister's words are made a vector at a time.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..compat import TorchDispatchMode
from .library import available, load

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 3}

# Between reading the generator's state and writing it nobody else may draw. torch locks its generator for its own
# operators; this lock is for those here.
_one_at_a_time = Lock()

# Below so many elements, reading and writing the generator's state takes longer than it saves.
MIN_NUMEL = 4096


def bernoulli_(x: Tensor, p: float = 0.5) -> Tensor:
    """As `x.bernoulli_(p)`: the same numbers, and the generator goes on in the same way."""
    plain = type(x) is Tensor and x.device.type == "cpu"  # with memory of its own, not fake
    fits = plain and x.dtype in _DTYPES and x.is_contiguous() and x.numel() >= MIN_NUMEL and 0 <= p <= 1
    if not fits or not available() or not _draws_like_torch():
        return x.bernoulli_(p)
    with _one_at_a_time:
        while True:
            before = torch.get_rng_state()
            after = before.clone()
            _fill(x, p, after)
            # Other threads may have drawn meanwhile, by torch: these numbers are theirs.
            if torch.equal(torch.get_rng_state(), before):
                torch.set_rng_state(after)
                return x


def _fill(x: Tensor, p: float, state: Tensor) -> Tensor:
    """Fill `x` from a generator's `state`, which goes on."""
    # A fraction of 53 bits lies below p if its numerator lies below this.
    bound = math.ceil(p * 2**53)
    load().hf_backrazor_bernoulli(
        ctypes.c_void_p(state.data_ptr()),
        ctypes.c_uint64(bound),
        ctypes.c_int64(_DTYPES[x.dtype]),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.numel()),
    )
    return x


@cache
def _draws_like_torch() -> bool:
    """Whether this build of torch draws as is assumed here; some builds draw from another generator."""
    generator = torch.Generator("cpu").manual_seed(20221128)
    torch.empty(3, device="cpu").uniform_(generator=generator)  # so as not to begin with a fresh block of words
    state = generator.get_state()
    for n, p in ((1, 0.1), (700, 0.5), (2000, 0.9)):
        expected = torch.empty(n, dtype=torch.float32, device="cpu").bernoulli_(p, generator=generator)
        found = _fill(torch.empty(n, dtype=torch.float32, device="cpu"), p, state)
        if not torch.equal(expected, found) or not torch.equal(state, generator.get_state()):
            return False
    return True


class FastBernoulli(TorchDispatchMode):
    """Inside of this context, whatever code draws Bernoulli numbers for dropout gets them from `bernoulli_`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See `TorchDispatchMode`."""
        if func is torch.ops.aten.bernoulli_.float and not kwargs:
            return bernoulli_(*args)
        return func(*args, **(kwargs or {}))
