"""What razor needs of other libraries that they keep private. No other file uses their private functions.

A private function may go missing, or do something else, in any release: `tests/test_compat.py` calls each of these.
Checked against torch 2.11 and 2.13, Transformers 5.1 and 5.23, Accelerate 1.10 and 1.15, PEFT 0.18 and 0.21.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, UntypedStorage, nn

# Code in which neither modes nor tensors of a subclass are asked what a function does.
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass
from torch._C._dynamo import eval_frame

# Tensors without values, which estimates and the compiler run on.
from torch._guards import TracingContext, detect_fake_mode

# An operator that draws from a given state of the generator, in the compiler's graph.
from torch._prims.rng_prims import run_with_rng_state as draw_from

# The order in memory that operators on feature maps give their results.
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.autograd.graph import Node

# What the layers of each kind have in common, whatever their number of dimensions, and subclasses of them.
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.conv import _ConvNd as AnyConvolution
from torch.nn.modules.instancenorm import _InstanceNorm as AnyInstanceNorm
from torch.nn.utils import parametrize

# The mode that sees functions of torch first; and a context without it.
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.overrides import _get_current_function_mode_stack as current_function_modes
from torch.overrides import _pop_mode_temporarily as without_current_function_mode
from torch.torch_version import TorchVersion

# Modes that see the operators that are called.
from torch.utils._python_dispatch import TorchDispatchMode

# Tensors within tuples, lists and dictionaries.
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "AnyBatchNorm",
    "AnyConvolution",
    "AnyInstanceNorm",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TreeSpec",
    "current_function_mode",
    "current_function_modes",
    "detect_fake_mode",
    "draw_from",
    "is_fake",
    "suggest_memory_format",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unset_fake_temporarily",
    "without_current_function_mode",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# An assertion on the device, which the host does not wait for.
assert_on_device = torch._assert_async

# The product of two matrices of 8-bit integers, in 32 bits; and whether a CPU has instructions for it.
integer_product, has_integer_products = torch._int_mm, torch.cpu._is_vnni_supported

# A tensor of a subclass that has no memory of its own.
make_wrapper_tensor = Tensor._make_wrapper_subclass

# Device, dtype and more, from any arguments that `Tensor.to` takes.
parse_to = torch._C._nn._parse_to


# How torch runs code: compiled, transformed, watched.


def no_frame_of_its_own(function: _Function) -> _Function:
    """Mark a function that the compiler traces inside of others and nowhere else.

    What many classes share would be traced once for each, up to a limit that it warns of.
    """
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, skip)
    return function


def code_of_its_own(function: _Function) -> _Function:
    """Give a function that is made once for each class a code object of its own.

    The compiler counts by these how often it has traced a function, up to a limit that it warns of.
    """
    function.__code__ = function.__code__.replace()
    return function


def in_functorch_transform() -> bool:
    """Whether code runs inside of a transform of `torch.func`, or of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether `x` stands for a batch of tensors, as inside of `torch.vmap`, and where `is_grads_batched=True`."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def in_checkpoint() -> bool:
    """Whether what is saved now goes to non-reentrant `torch.utils.checkpoint`, in the first forward or the second."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def is_dispatcher_watched() -> bool:
    """Whether somebody sees the operators that are called now: a mode such as that of fake tensors, or the profiler."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()


def keeps_parametrized() -> bool:
    """Whether what parametrizations compute is kept for the code that runs now (`parametrize.cached`)."""
    return bool(parametrize._cache_enabled)


def will_be_executed(node: Node) -> bool:
    """Whether autograd, called from a backward that runs now, goes on to `node`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` was asked for
        return True


def is_traced() -> bool:
    """Whether the compiler records the code that runs now, on tensors without values."""
    return TracingContext.try_get() is not None


def traced_constant(x: Tensor) -> Tensor:
    """`x`, which has values, where the compiler may be recording: as a constant of its graph."""
    return torch.ops.aten.lift_fresh_copy.default(x) if is_traced() else x


# With modules as arguments, and their parameters part of the graph: checked in torch 2.13 alone.
_TRACES_MODULES = TorchVersion(torch.__version__) >= "2.13"

# In the graph there are no arguments that are None.
_NONE = "hf_backrazor: none"


def traceable(function: _Function) -> _Function:
    """Mark a function that the compiler does not read, but runs on tensors without values, and records what it does.

    So it may be any Python that does not look at values. The compiler compiles it again when the tensors are of other
    shapes, or numbers and strings are others among the arguments and the attributes of the module. Older versions of
    torch break their graph at the function.

    Args:
        function: `function(module, *args, **kwargs)`. Arguments are tensors, numbers, strings, dtypes, and collections
            of these, or None; results are tensors and collections of them.
    """
    if not _TRACES_MODULES:
        return torch.compiler.disable(function)

    @torch._dynamo.nonstrict_trace
    def recorded(module: nn.Module, state: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tree_map(_with_sizes, (args, kwargs))
        given = (None if isinstance(x, str) and x == _NONE else x for x in args)
        return function(module, *given, **kwargs)

    @functools.wraps(function)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = tuple(x for x in vars(module).values() if isinstance(x, (bool, int, float, str)))
        graphable = tuple(_NONE if x is None else x for x in args)
        return recorded(module, state, graphable, {name: x for name, x in kwargs.items() if x is not None})

    return cast(_Function, call)


def _with_sizes(x: Any) -> Any:
    """`x`; where the compiler takes sizes of it for variable, a view with those of this graph."""
    if not isinstance(x, Tensor) or all(type(size) is int for size in x.shape):
        return x
    view = x.view([int(size) for size in x.shape])
    vars(view).update(vars(x))
    return view


def fix_sizes(*arguments: Any) -> None:
    """Have the compiler make a graph of its own for the sizes that tensors among these have."""
    for x in tree_leaves(arguments):
        if isinstance(x, Tensor):
            torch._dynamo.mark_static(x)


@no_frame_of_its_own
def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module now runs compiled code, as it has been compiled itself or is part of what has."""
    return eval_frame.get_eval_frame_callback() not in (None, False) or module._compiled_call_impl is not None


def is_replica(module: nn.Module) -> bool:
    """Whether this is a replica of DataParallel, which leaves it no parameters."""
    return getattr(module, "_is_replica", False)


# What tensors, operators and modules of torch hold.


def address_of(storage: UntypedStorage) -> int:
    """What tells a storage from others that are alive; fake ones, which hold no memory, as well."""
    return storage._cdata


def indices_and_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a COO tensor as they are; the public methods ask that it has been coalesced."""
    return x._indices(), x._values()


def leaves_functions_alone(cls: type) -> bool:
    """Whether functions of torch take tensors of this class for plain ones."""
    return getattr(cls, "__torch_function__", None) is torch._C._disabled_torch_function_impl


def schema_of(operator: Any) -> Any:
    """Name, arguments and results of an operator of `torch.ops`, and which of them share memory."""
    return operator._schema


def forward_hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The hooks that run before and after the module's forward."""
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def reshards_after_forward(module: nn.Module) -> bool:
    """Whether FSDP2 takes the module's weights away between forward and backward.

    Args:
        module: an `FSDPModule`.
    """
    state: Any = module._get_fsdp_state  # a method, which type checkers do not know of
    group = getattr(state(), "_fsdp_param_group", None)
    return getattr(group, "_reshard_after_forward", True)


# What Transformers, Accelerate and PEFT put on modules and configs.

# Where Accelerate leaves what moves a module's inputs and weights to where they belong, and the forward below that.
ACCELERATE_HOOK, ACCELERATE_FORWARD = "_hf_hook", "_old_forward"


def experts_implementation(config: Any) -> str:
    """By which code a model of Transformers runs its experts: "eager" is one after the other."""
    return getattr(config, "_experts_implementation", "eager")


def takes_cache_when_checkpointed(module: nn.Module) -> bool:
    """Whether a block of Transformers can be checkpointed with a cache as it is."""
    return getattr(module, "_can_checkpoint_with_cache", False)


def casts_for_adapters(cls: type[nn.Module]) -> bool:
    """Whether this is a layer of PEFT that casts its input for adapters of another dtype."""
    return callable(getattr(cls, "_cast_input_dtype", None))
