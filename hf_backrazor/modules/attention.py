"""Attention, through Transformers' `AttentionInterface`.

An attention module looks its attention function up under `self.config._attn_implementation`. A razor attention module
shows it a config that answers "razor" there and is the model's own in everything else; the function registered under
that name runs the implementation that the model's config asks for. So the model's config stays as it is (saving it,
building masks, and other models that share it are not affected), and `set_attn_implementation` goes on working.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..compat import TreeSpec, is_fake, is_traced, traceable, tree_flatten, tree_unflatten
from ..config import RazorConfig
from ..extension import class_cache
from ..functional import recomputed_attention, sparse_attention
from ..packing import PackSpec, pack_spec
from .base import RazorModule, describe, forward_source, input_spec, stand_in
from .own_calls import without_own_calls
from .probe import operator_running

logger = logging.get_logger(__name__)

IMPLEMENTATION = "razor"

# Where else a forward may read the name: GPT-2's asks whether to take its upcast path, which `handles` rules out.
_HARMLESS = re.compile(r'using_eager = self\.config\._attn_implementation == "eager"')
_LOOKUP = re.compile(r"get_interface\(\s*self\.config\._attn_implementation\s*,\s*(\w+)\s*,?\s*\)")


class RazorAttention(RazorModule):
    """A Transformers attention module that calls its attention function through `AttentionInterface`.

    Attributes:
        razor_scores: whether q and k need more than 4 bits.
    """

    kind = "attention"
    runs_own_code = True
    razor_scores: Scores

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        # GPT-2's upcast attention is a code path of its own that the module takes by the name "eager".
        upcast = getattr(module, "reorder_and_upcast_attn", False)
        function = _eager_function(type(module))
        return hasattr(module, "config") and not upcast and function is not None and not _branches(type(module))

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        if isinstance(module, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its layers' weights without calling them"
        if _eager_function(type(module)) is not None and _branches(type(module)):
            return f"{type(module).__name__} takes other paths by the name of its attention function"
        if "Attention" in type(module).__name__ and _computes_scores(type(module)) and not cls.handles(module):
            return f"{type(module).__name__} does not call its attention function through AttentionInterface"
        return None

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        super().install(module, config)
        assert isinstance(module, cls)
        module.razor_scores = Scores()

    @property
    def config(self) -> Any:
        """The model's config; in training, with this module's attention function in it."""
        config = self.__dict__["config"]
        return _ConfigView(config) if self.training else config

    @config.setter
    def config(self, config: Any) -> None:
        self.__dict__["config"] = config

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        config = self.razor_config
        if config.attention == "sparse":
            return f"{describe(input_spec(config))} of q, k, v, probabilities"
        return f"razor=q, k, v in {config.qkv_bits} bits"


class Scores:
    """What the first forward of an attention module shows of its scores. Replicas of a model share it.

    Errors of q and k in 4 bits change a score by a tenth of what scores differ by, and probabilities by the exponential
    of that. SmolLM2-135M's scores have a standard deviation of 1.1 to 3.5, by layer. Of Gemma 4, whose scores are
    products of normalised vectors that nothing divides by the root of their length, it is 5.7 at the start with heads
    of 32: the gradient's cosine is 0.56 from 4 bits, and 0.98 from 8.
    """

    SHARP = 4.0

    def __init__(self) -> None:
        self.deviation: float | None = None

    def are_sharp(self, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether they differ too much for q and k in 4 bits; the host waits for the answer, once."""
        if self.deviation is None:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            if is_traced():
                # Of values that nobody has looked at: as if they were those of a norm.
                return scaling * query.shape[-1] ** 0.5 > self.SHARP
            if is_fake(query) or query.is_meta:
                return False
            # What all keys have in common changes no probability.
            q, k = query.detach().float(), key.detach().float()
            squares = q.square().mean() * (k - k.mean(-2, keepdim=True)).square().mean() * query.shape[-1]
            self.deviation = float(scaling * squares.sqrt())
        return self.deviation > self.SHARP


class _ConfigView:
    """A model config seen by a razor attention module."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def razor_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of razor attention modules (see `AttentionInterface` for the arguments).

    Returns the output and, as the SDPA path does, None for the attention weights.
    """
    if not isinstance(module, RazorAttention):
        raise ValueError(
            f"attn_implementation={IMPLEMENTATION!r} is for the modules that `get_razor_model` prepares, and "
            f"{type(module).__name__} is not one; load the model with 'sdpa' and call `get_razor_model` on it"
        )
    attend = _attention_in_graph if torch.compiler.is_dynamo_compiling() else _attention
    implementation = module.__dict__["config"]._attn_implementation
    output, *weights = attend(module, implementation, query, key, value, attention_mask, **kwargs)
    return output, weights[0] if weights else None


def _attention(
    module: RazorAttention,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """The output; and weights, if there are any."""
    default = cast(Callable, _eager_function(module.plain_class))
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)
    with without_own_calls():
        if not module.packs(query, key, value):
            output, weights = function(module, query, key, value, attention_mask, **kwargs)
            return (output,) if weights is None else (output, weights)
        with operator_running():
            return (_packed_attention(module, function, query, key, value, attention_mask, kwargs),)


_attention_in_graph = traceable(_attention)


def _packed_attention(
    module: RazorAttention,
    function: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "Razor attention does not return attention weights in training: they are not kept. For weights, call the "
            "model in eval mode with `attn_implementation='eager'`."
        )
    config: RazorConfig = module.razor_config
    # Such as the sinks that GPT-OSS's eager attention reads from its module.
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if config.attention == "sparse" and (reason := _beyond_sparse(module, kwargs, attention_mask, parameters)):
        logger.warning_once(
            f"{type(module).__name__}: attention='sparse' does not know {reason}; probabilities are recomputed from "
            "sparse q, k, v instead."
        )
    elif config.attention == "sparse":
        return _sparse(module, function, query, key, value, attention_mask, kwargs)

    # Tensors among the arguments go through autograd by themselves. `attend` lives as long as the graph does, and must
    # hold none of them: a mask that it held would stay whole, beside the packed one.
    leaves, tree = tree_flatten((attention_mask, kwargs))
    others = [*parameters.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    bound = [_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    attend = partial(_attend, function, module, tuple(parameters), bound, tree)
    spec = input_spec(config) if config.attention == "sparse" else _qkv_spec(config)
    if spec.bits == 4 and config.attention == "recompute" and module.razor_scores.are_sharp(query, key, kwargs):
        spec = replace(spec, sparsity=1.0, bits=8, rotated=False)
    random = bool(kwargs.get("dropout"))
    return recomputed_attention(attend, query, key, value, others, spec, random)


_PLACE = object()


def _attend(
    function: Callable,
    module: RazorAttention,
    parameters: Sequence[str],
    bound: list[Any],
    tree: TreeSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Tensor,
) -> Tensor:
    """Attention's output.

    `others` are the module's own parameters, then mask and named arguments, wherever `bound` leaves a place for one.
    """
    tensors = iter(others)
    # Eager attention drops if its module is in training; the module may have left that before backward.
    plain = stand_in(module, {name: next(tensors) for name in parameters})
    mask, named = tree_unflatten([next(tensors) if leaf is _PLACE else leaf for leaf in bound], tree)
    return function(plain, query, key, value, mask, **named)[0]


def _sparse(
    module: RazorAttention,
    function: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    dropout = kwargs.get("dropout") or 0.0
    scaling = kwargs.get("scaling")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Eager attention masks by the mask alone; SDPA's flag takes its place, as `sdpa_attention_forward` decides.
    uses_flag = module.__dict__["config"]._attn_implementation != "eager"
    is_causal = bool(is_causal) and uses_flag and attention_mask is None and query.shape[2] > 1

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not dropout:
            return function(module, query, key, value, attention_mask, **kwargs)[0]
        # The math path drops with one call of dropout on the probabilities, which backward can repeat. On a CPU it is
        # the one that is taken with dropout anyhow.
        with sdpa_kernel(SDPBackend.MATH):
            return function(module, query, key, value, attention_mask, **kwargs)[0]

    return sparse_attention(
        attend,
        query,
        key,
        value,
        _add_position_bias(kwargs.get("position_bias"), attention_mask),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal,
        dropout,
        input_spec(module.razor_config),
    )


def _add_position_bias(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The mask that T5's learned position bias and the attention mask make together."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _beyond_sparse(
    module: nn.Module, kwargs: dict[str, Any], attention_mask: Any, parameters: Mapping[str, Tensor]
) -> str | None:
    """What changes the probabilities in a way that sparse attention does not reproduce."""
    name = module.__dict__["config"]._attn_implementation
    if name not in ("eager", "sdpa"):
        return f"attn_implementation={name!r}"
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return type(attention_mask).__name__
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 4:
        return f"an attention mask of {attention_mask.dim()} dimensions"
    if parameters:
        return "parameters of the module's own"
    for name in ("softcap", "s_aux", "head_mask"):
        if kwargs.get(name) is not None:
            return f"`{name}`"
    return None


def _qkv_spec(config: RazorConfig) -> PackSpec:
    """How q, k and v are packed when probabilities are recomputed from them.

    Keys of a pretrained ViT are mostly what they have in common, and heads have outlier channels. Gradient fidelity on
    ViT-S with nothing but q, k, v in 4 bits: 0.866; centred 0.951; with even levels 0.983; with one element of each 64
    exact 0.991. On MiniLM-L6: 0.996 to 0.998. Rotated as well, 0.990 on SmolLM2-135M, and 0.982 as they are.
    """
    if config.qkv_bits == 32:
        return pack_spec()
    if config.qkv_bits == 16:
        return pack_spec(value_dtype="float16")
    sparsity = config.sparsity if config.qkv_bits < 8 and config.sparsity else 1.0
    rotated = config.qkv_bits == 4
    return pack_spec(sparsity, "row", config.qkv_bits, config.value_dtype, levels="even", centred=True, rotated=rotated)


@class_cache
def _eager_function(cls: type[nn.Module]) -> Callable | None:
    """The function that the class's forward gives `AttentionInterface` as default; None if it does not use that."""
    found = _LOOKUP.search(forward_source(cls))
    return inspect.unwrap(cls.forward).__globals__.get(found.group(1)) if found else None


@class_cache
def _branches(cls: type[nn.Module]) -> bool:
    """Whether the class's forward does something else, too, by the name of its attention function."""
    source = _HARMLESS.sub("", _LOOKUP.sub("", forward_source(cls)))
    return "_attn_implementation" in source or "is_flash_attention_requested" in source


@class_cache
def _computes_scores(cls: type[nn.Module]) -> bool:
    """Whether the class's own forward computes attention probabilities."""
    source = forward_source(cls)
    return "softmax(" in source or "scaled_dot_product_attention(" in source


AttentionInterface.register(IMPLEMENTATION, razor_attention_forward)
