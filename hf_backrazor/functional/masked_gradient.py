"""Gradients that are zero in places, together with where: what ReLU gives back, and a norm reads as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..packing import Steps, times_steps


class MaskedGradient(Tensor):
    """The gradient of ReLU's output, and the bits of what it let through, instead of their product.

    A batch norm applies the bits while it reads the gradient, which saves a tensor of that size written and read. Any
    other function of torch (a hook's, or autograd's when it adds gradients) gets the product, computed once.

    Attributes:
        unmasked: the gradient of the output.
        bits: what `pack_steps` returned for a derivative of 0 or 1.
    """

    unmasked: Tensor
    bits: Tensor
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, unmasked: Tensor, bits: Tensor) -> MaskedGradient:
        """Of a gradient that is contiguous."""
        kwargs = {"dtype": unmasked.dtype, "device": unmasked.device}
        self = torch.Tensor._make_wrapper_subclass(cls, unmasked.shape, **kwargs)
        self.unmasked, self.bits, self._dense = unmasked, bits, None
        return self

    def __init__(self, unmasked: Tensor, bits: Tensor) -> None:
        super().__init__()

    def dense(self) -> Tensor:
        """The product. From then on it stands for this tensor, also if it is written to."""
        if self._dense is None:
            self._dense = times_steps(self.unmasked, self.bits, Steps())
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def with_mask(grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """A gradient, and the bits of it that are still to be applied; None: none."""
    if not isinstance(grad, MaskedGradient):
        return grad, None
    return (grad.unmasked, grad.bits) if grad._dense is None else (grad._dense, None)
