"""Elements of lazy tensors: how they are computed, from what, and who shares their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.utils import logging

from ..compat import DisableTorchFunction, FakeTensor

logger = logging.get_logger(__name__)

FINGERPRINT_NUMEL = 256


class Computation:
    """A tensor as a function of others, for subclasses to say which; nothing is computed before it is asked for.

    Args:
        inputs: tensors that the tensor depends on; None where the function takes that.
        name: what is computed, for errors and notices.
    """

    def __init__(self, inputs: tuple[Any, ...], name: str) -> None:
        self.inputs, self.name = inputs, name
        self._versions = self._current_versions()
        self._fingerprints = self._current_fingerprints()

    def forward(self, *inputs: Any) -> Tensor:
        """The tensor, for detached `inputs`; runs below autograd."""
        raise NotImplementedError

    def gradients(self, grad: Tensor, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Those of `self.inputs` that are needed, differentiable themselves."""
        raise NotImplementedError

    def elements(self, asked_by: str) -> Tensor:
        """The tensor, without a graph; `asked_by` names the function that reads it.

        Raises:
            RuntimeError: an input is not what it was when the tensor was made.
        """
        if not self.unchanged():
            raise RuntimeError(
                f"{self.name} were not computed before the weights that they depend on, or their input, changed, and "
                "can no longer be: read or detach them before `optimizer.step()`, or what else changes these in place"
            )
        logger.warning_once(
            f"{self.name} are computed whole, as `{asked_by}` asks for them; "
            "`torch.nn.functional.cross_entropy` over class numbers does without"
        )
        # Later operators may save what is first read in inference mode.
        with torch.inference_mode(False), torch.no_grad(), DisableTorchFunction():
            return self.forward(*(None if x is None else x.detach() for x in self.inputs))

    def unchanged(self) -> bool:
        """Whether the inputs are what they were when the tensor was made."""
        # Some optimizers write without a new version, through `.data` or in kernels of their own.
        return self._versions == self._current_versions() and all(
            map(_identical, self._fingerprints, self._current_fingerprints())
        )

    def require_same_versions(self) -> None:
        """Raise RuntimeError if an input that the gradient depends on has been written to, as autograd does."""
        if self._versions != self._current_versions():
            raise RuntimeError(
                f"one of the tensors that {self.name} depend on has been modified by an inplace operation, so that "
                "their gradient can no longer be computed: call `backward` before `optimizer.step()`"
            )

    def _current_versions(self) -> list[int]:
        return [0 if x is None or x.is_inference() else x._version for x in self.inputs]

    def _current_fingerprints(self) -> list[Tensor | None]:
        return [_fingerprint(x) for x in self.inputs if x is not None and x.is_leaf]


def _fingerprint(x: Tensor) -> Tensor | None:
    """At most `FINGERPRINT_NUMEL` elements from all over `x`; None where there are none to compare."""
    # FSDP may have taken the memory away again.
    gone = x.is_meta or isinstance(x, FakeTensor) or type(x) not in (Tensor, torch.nn.Parameter)
    if gone or x.untyped_storage().size() == 0 or not x.numel():
        return None
    with torch.inference_mode(False), torch.no_grad(), DisableTorchFunction():
        places = torch.arange(0, x.numel(), -(-x.numel() // FINGERPRINT_NUMEL), device=x.device)
        return x.detach()[torch.unravel_index(places, x.shape)]


def _identical(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return True
    return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


class Elements:
    """The elements of a lazy tensor, or how they come to be.

    Args:
        make: computes them; called with the name of the function that asks.
        owner: where these are a view, whose memory they lie in.
    """

    def __init__(self, make: Callable[[str], Tensor], owner: Elements | None = None) -> None:
        self._view_of = owner
        self._make: Callable[[str], Tensor] | None = make
        self._values: Tensor | None = None
        self._copies: WeakSet[Elements] = WeakSet()
        self._shared = False

    @property
    def owner(self) -> Elements:
        """Whose memory they lie in."""
        return self._view_of or self

    @property
    def there(self) -> bool:
        """Whether they are computed."""
        return self._values is not None

    def get(self, asked_by: str) -> Tensor:
        """A dense tensor without a graph, always the same."""
        if self._values is None:
            assert self._make is not None
            self._values = self._make(asked_by)
            self._make = None
        return self._values

    def handed_out(self, asked_by: str) -> Tensor:
        """As `get`, for whoever may write to it."""
        self.share()
        return self.get(asked_by).detach()

    def then(self, function: Callable[[Tensor], Tensor], view: bool) -> Elements:
        """Those of `function` of these; `view`: in the same memory."""
        result = Elements(lambda asked_by: function(self.get(asked_by)), self.owner if view else None)
        if not view:
            if self.owner._shared:
                result.get("a copy")
            else:
                self.owner._copies.add(result)
        return result

    def share(self) -> None:
        """To be called before the memory can be written to: compute what was put off and reads it.

        As nobody tells when that happens, copies are made at once from now on.
        """
        self.owner._shared = True
        for other in list(self.owner._copies):
            other.get("a change in place")
        self.owner._copies.clear()
