"""Random numbers: the state of a device's default generator, kept to draw again in backward; and drawing faster."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compat import is_traced
from ..kernels.bernoulli import FastBernoulli
from .traced import TracedDraws


def get_rng_state(device: torch.device) -> Tensor:
    """State of the default generator of `device`: uint8, 5056 bytes on a CPU, 16 on CUDA."""
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "meta":  # draws nothing
        return torch.empty(0, dtype=torch.uint8)
    return torch.get_device_module(device).get_rng_state(device)


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Set the default generator of `device`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type != "meta":
        torch.get_device_module(device).set_rng_state(state, device)


def fast_dropout(device: torch.device, numel: int) -> AbstractContextManager:
    """A context in which somebody else's code draws its dropout faster, where that can be; the same numbers.

    Args:
        device: where they are drawn.
        numel: about how many. To look at the operators of SDPA takes 100 microseconds: on one thread, 2^14
            probabilities are attended by in 205 instead of 157, and 2^16 in 442 instead of 566.
    """
    return FastBernoulli() if device.type == "cpu" and numel >= 2**16 else nullcontext()


def forked_rng(devices: Iterable[torch.device]) -> AbstractContextManager:
    """A context after which torch's default generators of these devices, and the CPU's, are as they were before it."""
    others = {device for device in devices if device.type not in ("cpu", "meta")}
    device_type = next(iter(others)).type if others else "cuda"
    return torch.random.fork_rng(devices=list(others), device_type=device_type)


class HostRandomState:
    """Where the generators of Python and of NumPy are that code without one of its own draws from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()

    def restore(self) -> None:
        """Go back there."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def is_present(self) -> bool:
        """Whether they are still there."""
        now = HostRandomState()
        (_, keys, *rest), (_, present_keys, *present_rest) = self._numpy, now._numpy
        return now._python == self._python and present_rest == rest and np.array_equal(present_keys, keys)


@contextmanager
def noting_draws(like: Tensor, numel: int, states: list[Tensor]) -> Iterator[None]:
    """Inside this context somebody else's code draws its dropout, and `drawing_again` can have the same numbers drawn.

    Args:
        like: a tensor on the device where they are drawn.
        numel: about how many (see `fast_dropout`).
        states: what `drawing_again` needs is appended to these.
    """
    if is_traced():
        with TracedDraws.first(like, states):
            yield
        return
    states.append(get_rng_state(like.device))
    with fast_dropout(like.device, numel):
        yield


@contextmanager
def drawing_again(like: Tensor, numel: int, states: Sequence[Tensor]) -> Iterator[None]:
    """Inside this context the numbers are drawn again that were drawn in `noting_draws`, if any were.

    The generator is after it where it was before.
    """
    if not states:
        yield
    elif is_traced():
        with TracedDraws(iter(states).__next__):
            yield
    else:
        (state,), present = states, get_rng_state(like.device)
        set_rng_state(like.device, state)
        try:
            with fast_dropout(like.device, numel):
                yield
        finally:
            set_rng_state(like.device, present)
