"""What is done in another way where the compiler traces it: drawing numbers again, and computing again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import TorchDispatchMode, draw_from


class TracedDraws(TorchDispatchMode):
    """Lets each operator that draws do so from a state which is a tensor of the compiler's graph.

    The compiler may move operators, and would take what the generator's state is now for a constant.

    Args:
        next_state: gives the state for the next one.
    """

    def __init__(self, next_state: Callable[[], Tensor]) -> None:
        super().__init__()
        self._next_state = next_state

    @classmethod
    def first(cls, like: Tensor, states: list[Tensor]) -> TracedDraws:
        """For the first time: states of new generators, for the device of `like`, which are appended to `states`."""

        def new_state() -> Tensor:
            states.append(fork_rng(like, len(states)))
            return states[-1]

        return cls(new_state)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].copy_(draw_from(self._next_state(), torch.ops.aten.bernoulli.p, *args))
        return draw_from(self._next_state(), func, *args, **kwargs)


@torch.library.custom_op("hf_backrazor::fork_rng", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def fork_rng(like: Tensor, number: int) -> Tensor:
    """The state of a new generator for the device of `like`, seeded from torch's generator for the CPU.

    Args:
        like: any tensor.
        number: another for each call that has the same tensor, as the compiler computes what is the same once.

    Returns:
        uint8, as `torch.Generator.get_state` gives it, on the CPU.
    """
    seed = int(torch.randint(2**62, ()))
    return torch.Generator(like.device).manual_seed(seed).get_state()


@fork_rng.register_fake
def _fake_fork_rng(like: Tensor, number: int) -> Tensor:
    return torch.empty(len(torch.Generator(like.device).get_state()), dtype=torch.uint8, device="cpu")


@torch.library.custom_op("hf_backrazor::once_more", mutates_args=())
def once_more(x: Tensor) -> Tensor:
    """A copy of `x`. What is computed from it is no value of the forward, for the compiler, that it could save."""
    return x.clone()


@once_more.register_fake
def _fake_once_more(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hf_backrazor::cast_again", mutates_args=())
def cast_again(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another dtype. The compiler would save the cast that autocast has made of a weight in the forward."""
    return x.to(dtype, copy=True)


@cast_again.register_fake
def _fake_cast_again(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)
