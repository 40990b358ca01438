"""Operators that a module's own code applies without a module for them.

Model code calls functions of torch: dropout in OPT, BART and Whisper, convolutions and norms in BiT, pooling and
activation functions in many a network for images. And it multiplies: a gated MLP (`act(gate) * up`, in Llama and its
kin), a gate of channels (squeeze and excitation), a trained vector (PEFT's DoRA and IA3, layer scale). The model itself
resizes logits before its loss, in dense prediction. Which module does so is seen when it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compat import (
    AnyConvolution,
    code_of_its_own,
    in_checkpoint,
    is_replica,
    no_frame_of_its_own,
    traceable,
    tree_leaves,
)
from ..config import RazorConfig
from .base import RazorModule, describe, input_spec, norm_spec
from .calls import CALLS
from .own_calls import Calls, OwnCalls, without_own_calls
from .probe import is_dense

# Of torch's own layers, those that call more than one function.
_COMPOSED = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class RazorInline(RazorModule):
    """A module with code of its own: the functions in it that razor has operators for are replaced when it runs.

    It may have an operator besides, as attention that drops by itself.

    Attributes:
        razor_calls: what was seen so far.
        is_model: whether this is what the user calls, and takes losses of.
        razor_reason: why it stays dense if nothing is seen, where a user would not expect that.
    """

    # Decoder layers among them, which FSDP and device maps know by the name of their class.
    name_prefix = ""
    runs_own_code = True
    is_model: ClassVar[bool] = False
    razor_calls: Calls
    razor_reason: str | None

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        if type(module).__module__.startswith("torch."):
            # A convolution that pads in another way calls one function for that, and one more.
            pads = isinstance(module, AnyConvolution) and module.padding_mode != "zeros"
            return pads or isinstance(module, _COMPOSED)
        return not isinstance(module, (nn.ModuleList, nn.ModuleDict))

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        super().install(module, config)
        assert isinstance(module, cls)
        module.razor_calls, module.razor_reason = Calls(), None

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: a forward with the plain one's signature, from which Trainer reads what it takes."""

        @code_of_its_own
        @functools.wraps(extended.forward)
        def forward(self: RazorInline, *args: Any, **kwargs: Any) -> Any:
            calls = self.razor_calls
            if not (self.training and self.razor_enabled):
                return extended.forward(self, *args, **kwargs)
            if torch.compiler.is_dynamo_compiling():
                if calls.seen_nothing:
                    return extended.forward(self, *args, **kwargs)
                with OwnCalls(self, CALLS, None, _in_graph):
                    return extended.forward(self, *args, **kwargs)
            if calls.rest():
                return extended.forward(self, *args, **kwargs)
            return _watch(self, functools.partial(extended.forward, self), args, kwargs)

        if issubclass(extended, RazorModule):
            return {"forward": forward}

        @no_frame_of_its_own
        def __call__(self: RazorInline, *args: Any, **kwargs: Any) -> Any:
            with without_own_calls():
                return extended.__call__(self, *args, **kwargs)

        return {"forward": forward, "__call__": __call__}

    @property
    def kind(self) -> str:  # type: ignore[override]  # which of an operator is one for all
        """See `RazorModule`: that of its operator, if it has one."""
        return getattr(super(), "kind", None) or ("inline" if self.razor_calls.kinds else "other")

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        config = self.razor_config
        packed, normed = (describe(spec).removeprefix("razor=") for spec in (input_spec(config), norm_spec(config)))
        details = {
            "dropout": "functional dropout in 1 bit",
            "activation": f"functional activation in {config.activation_bits} bits",
            "linear": f"functional linear, {packed}",
            "convolution": f"functional convolution, {packed}",
            "norm": f"functional norm, {normed} of {config.norm}",
            "pooling": "functional pooling",
            "padding": "padding that is restored",
            "gate": f"gated product in {config.activation_bits} bits",
            "scale": f"scaled tensor, {packed}",
            "logits": "loss in bands, resized logits on demand",
        }
        own = super().razor_repr()
        seen = self.__dict__["razor_calls"].kinds if "razor_calls" in self.__dict__ else {}
        what = ([own.removeprefix("razor=")] if own else []) + [details[kind] for kind in seen]
        return "razor=" + ", ".join(what) if what else ""


class RazorOutermost(RazorInline):
    """The model itself."""

    is_model = True


# A function, as the class that is extended may have methods of any name.
def _watch(module: RazorInline, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `function`, the forward of what was extended, returns, with its own calls replaced."""
    calls = module.razor_calls
    if is_dense() or not torch.is_grad_enabled() or (not calls.kinds and _is_idle(module, args, kwargs)):
        return function(*args, **kwargs)
    # Under checkpointing, a forward has to save the second time what it saved the first time.
    known = not calls.kinds and calls.forwards and in_checkpoint()
    with without_own_calls(), nullcontext() if known else OwnCalls(module, CALLS, (args, kwargs)):
        result = function(*args, **kwargs)
    calls.count()
    return result


def _is_idle(module: RazorInline, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this forward shows nothing, as there are no gradients in it."""
    if is_replica(module):
        return False
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return not module.razor_active(*tensors, *module.parameters())


@traceable
def _in_graph(module: RazorInline, place: int, *args: Any, **kwargs: Any) -> Any:
    """What takes the place of a function in the table, or else what that gives."""
    function, calls = list(CALLS.items())[place]
    for call in calls:
        # Those that look at these give lazy tensors, which no graph holds.
        if not call.sees_inputs and (result := call.replacement(module, *args, **kwargs)) is not NotImplemented:
            return result
    return function(*args, **kwargs)
