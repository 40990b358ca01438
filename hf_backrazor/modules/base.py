"""What all razor modules have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..compat import in_checkpoint, in_functorch_transform, no_frame_of_its_own, traceable
from ..config import RazorConfig
from ..extension import Extension, class_cache, extend
from ..functional.sharing import origin_of
from ..packing import PackSpec, pack_spec
from .again import argument_names
from .own_calls import without_own_calls
from .probe import is_dense, operator_running

logger = logging.get_logger(__name__)

# Elements up to which the input of a classifier, one row a sample, is kept whole: 1 MiB in float32.
POOLED_NUMEL = 2**18


class RazorModule(Extension):
    """A module whose class was extended in place so that it saves packed activations.

    Attributes:
        kind: the kind of operator, as `memory_report` names it.
        runs_own_code: whether the forward is the plain class's own, which razor looks into.
        is_traced: whether the compiler's graph may hold what an operator's forward does; else it breaks there.
        razor_config: the settings that hold for this module, overrides applied.
        razor_enabled: false makes the module behave as the plain one.
    """

    kind: ClassVar[str]
    name_prefix: ClassVar[str] = "Razor"
    runs_own_code: ClassVar[bool] = False
    is_traced: ClassVar[bool] = True
    razor_config: RazorConfig
    razor_enabled: bool

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """Whether this operator can stand in for `module`."""
        raise NotImplementedError

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """Why a module that looks like this operator's business is left as it is; None if it does not look so."""
        return None

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """Extend `module` by this class."""
        extend(module, cls)
        assert isinstance(module, cls)
        module.razor_config = config
        module.razor_enabled = True

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: an operator's forward, with the names that the plain one has for its arguments."""
        if not hasattr(cls, "forward"):
            return {}
        theirs, ours = (argument_names(owner.forward) for owner in (extended, cls))
        renamed = {their: our for their, our in zip(theirs, ours, strict=False) if their != our}
        recorded = traceable(cls.forward) if cls.is_traced else torch.compiler.disable(cls.forward)

        @functools.wraps(extended.forward)
        def forward(self: RazorModule, *args: Any, **kwargs: Any) -> Any:
            compiling = torch.compiler.is_dynamo_compiling()
            # Outside of training it is the plain module, which the compiler and `torch.export` can trace.
            if compiling and not (self.training and self.razor_enabled):
                return extended.forward(self, *args, **kwargs)
            if renamed:
                kwargs = {renamed.get(name, name): value for name, value in kwargs.items()}
            return (recorded if compiling else cls.forward)(self, *args, **kwargs)

        return {"forward": forward}

    def clear(self) -> None:
        """Delete what `install` added to the object; its class is still extended."""
        for name in [name for name in self.__dict__ if name.startswith("razor_")]:
            del self.__dict__[name]

    @no_frame_of_its_own
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's."""
        if torch.compiler.is_dynamo_compiling():
            with without_own_calls():
                return super().__call__(*args, **kwargs)
        with without_own_calls(), self._as_operator():
            return super().__call__(*args, **kwargs)

    def _as_operator(self) -> AbstractContextManager:
        """What the module saves is what its operator saves, and no loose tensor, unless code of its own runs in it."""
        return nullcontext() if self.runs_own_code else operator_running()

    def razor_active(self, *tensors: Tensor | None, parameters: Sequence[str] = ()) -> bool:
        """Whether this call saves packed activations: in training, with gradients wanted.

        Args:
            tensors: those that a gradient may be wanted for.
            parameters: names of parameters that one may be wanted for.
        """
        return self.training and self._saves_for(tensors, parameters)

    def packs(self, x: Any, *others: Tensor | None, parameters: Sequence[str] = ()) -> bool:
        """Whether this call saves `x` packed: it is a tensor worth it, and a gradient is wanted for one of them all."""
        return isinstance(x, Tensor) and self.razor_active(x, *others, parameters=parameters) and self.worth_packing(x)

    def _saves_for(self, tensors: Sequence[Tensor | None], parameters: Sequence[str]) -> bool:
        if not (self.razor_enabled and torch.is_grad_enabled()) or is_dense():
            return False
        if not (any(x is not None and x.requires_grad for x in tensors) or any(map(self._trains, parameters))):
            return False
        if in_functorch_transform():
            logger.warning_once(
                "razor: what runs inside of torch.func's transforms (`vmap`, `grad`, `jvp`, ...) or of forward-mode "
                "differentiation is saved dense"
            )
            return False
        return True

    def _trains(self, name: str) -> bool:
        """Whether a gradient is wanted for a parameter.

        It is not read if it is parametrized: that computes it, and is a step of spectral norm's power iteration.
        """
        if self.is_parametrized() and name in self.parametrizations:
            return any(original.requires_grad for original in self.parametrizations[name].parameters())
        value = getattr(self, name)
        return value is not None and value.requires_grad

    def is_parametrized(self) -> bool:
        """Whether a parameter is computed by `torch.nn.utils.parametrize`."""
        return "parametrizations" in self._modules

    def worth_packing(self, x: Tensor) -> bool:
        """Whether `x` can be packed, and is large enough to be."""
        if x.is_nested or x.layout is not torch.strided:
            logger.warning_once("razor: nested and sparse tensors are saved as they are")
            return False
        return x.is_floating_point() and x.numel() >= max(1, self.razor_config.min_numel)

    def works_in_place(self, x: Tensor) -> bool:
        """Whether an operator may write its result to `x`.

        Autograd allows no function of two results to change a view. And checkpointing stops its second forward when
        the last tensor is saved: before the plain operator writes, but after an autograd function has written, to what
        others saved.
        """
        return x._base is None and not in_checkpoint()

    def razor_repr(self) -> str:
        """The settings that matter to this operator, for `print(model)`."""
        return ""

    def extra_repr(self) -> str:
        """The plain module's, followed by the razor settings."""
        return ", ".join(text for text in (super().extra_repr(), self.razor_repr()) if text)


def stand_in(module: RazorModule, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A plain module in training with the attributes of `module`, and these tensors for its own parameters.

    What a backward computes again is to read the tensors that autograd saved: the module may hold others by then, as
    after `torch.func.functional_call`.
    """
    plain = module.plain_class.__new__(module.plain_class)
    plain.__dict__ = {**module.__dict__, "_parameters": dict(parameters), "training": True}
    return plain


def input_spec(config: RazorConfig, row_dims: int = 1) -> PackSpec:
    """How the inputs of linear layers are packed; with more dimensions in a row, those of convolutions."""
    return _spec(config, config.residual_bits, row_dims, multiplied=config.weight_gradient == "int8")


def linear_spec(config: RazorConfig, x: Tensor) -> PackSpec:
    """How `x` is packed for a linear layer: as `input_spec`, but whole if it has one row a sample, and few of these.

    No tokens or pixels average out the error of such a row in the weight's gradient. Of a ResNet-50 with eight images,
    the classifier has most of the gradient and 64 KiB of input: its gradient's cosine is 0.88 from 2 bits.
    """
    spec = input_spec(config)
    # Tokens in a row, as in OPT, come from a norm or an activation function, and cost nothing.
    return PackSpec() if spec.bits and is_pooled(x) and origin_of(x) is None else spec


def is_pooled(x: Tensor) -> bool:
    """Whether `x` has one row a sample, as what a classifier or its pooler works on, and is small."""
    return x.dim() == 2 and 6 * x.shape[0] <= x.shape[1] and x.numel() <= POOLED_NUMEL


def activation_bits(config: RazorConfig, x: Tensor) -> int:
    """Bits for the input `x` of an activation function: all of it where that is a pooled one.

    Of a BERT's pooler, tanh and then the classifier read 24 KiB for 16 texts. In 4 bits, the gradient of the
    classifier's weight has a cosine of 0.31 (MiniLM-L6).
    """
    return 32 if config.activation_bits <= 8 and is_pooled(x) else config.activation_bits


def norm_spec(config: RazorConfig, row_dims: int = 1) -> PackSpec:
    """How norms pack what they store."""
    return _spec(config, config.norm_bits, row_dims, multiplied=config.weight_gradient == "int8")


def map_norm_spec(config: RazorConfig, spatial: int) -> PackSpec:
    """How norms of feature maps with so many spatial dimensions pack what they store.

    An input is kept whole, as the released code of the paper does: top-k over a sample leaves nothing of most channels,
    and the gradient through a norm of those would be arbitrary.
    """
    return PackSpec(row_dims=spatial) if config.norm == "input" else norm_spec(config, spatial)


def product_spec(config: RazorConfig) -> PackSpec:
    """How the factors of a gated MLP's product are packed."""
    return _spec(config, config.activation_bits)


def gate_spec(config: RazorConfig) -> PackSpec | None:
    """How an activation function's input is packed whose output multiplies another tensor; None: in cells.

    Half of the energy of SmolLM2-135M's gates is their mean over tokens. With nothing but gate and up packed, in 4 bits
    each, its gradient has a cosine of 0.962 from cells of one scale for all rows, and of 0.995 from these codes.
    """
    if config.activation_bits > 4 or config.granularity != "row" or not config.sparsity:
        return None
    return replace(product_spec(config), centred=True)


def whole_shape(weight: Tensor) -> torch.Size:
    """Shape of a parameter that may be sharded: ZeRO-3 leaves an empty tensor, with the shape beside it."""
    return getattr(weight, "ds_shape", weight.shape)


def describe(spec: PackSpec) -> str:
    """A few words on `spec`, for `print(model)`."""
    if spec.sparsity == 0:
        return "razor=all exact"
    residual = f" + {spec.bits} bits" if spec.bits else ""
    return f"razor={100 * (1 - spec.sparsity):.3g}% of each {spec.granularity} exact{residual}"


def _spec(config: RazorConfig, bits: int, row_dims: int = 1, multiplied: bool = False) -> PackSpec:
    # With everything kept exactly there is nothing left to code.
    bits = bits if config.sparsity else 0
    # Feature maps gain nothing. Linear layers of tokens do, but the codes of rotated rows are no integers to multiply.
    rotated = 1 <= bits <= 4 and row_dims == 1 and config.granularity == "row" and not multiplied
    return pack_spec(config.sparsity, config.granularity, bits, config.value_dtype, row_dims=row_dims, rotated=rotated)


@class_cache
def forward_source(cls: type[nn.Module]) -> str:
    """Source of the class's forward; empty where there is none to read."""
    try:
        return inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):  # defined at a prompt or in C
        return ""
