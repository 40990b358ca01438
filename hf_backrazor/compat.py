"""What torch shows of itself through private functions alone. Checked against torch 2.13."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._guards import TracingContext
from torch._prims.rng_prims import run_with_rng_state
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.utils import parametrize
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves

_Function = TypeVar("_Function", bound=Callable[..., Any])


def no_frame_of_its_own(function: _Function) -> _Function:
    """Mark a function that the compiler traces inside of others and nowhere else.

    What many classes share would be traced once for each, up to a limit that it warns of.
    """
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, skip)
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


def draw_from(state: Tensor, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `operator` returns if the default generator is in `state`, in the compiler's graph."""
    return run_with_rng_state(state, operator, *args, **kwargs)


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
        for size in (size for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) for size in x.shape):
            int(size)  # which the compiler may take for variable: from here on it is that of this graph
        given = (None if isinstance(x, str) and x == _NONE else x for x in args)
        return function(module, *given, **kwargs)

    @functools.wraps(function)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = tuple(x for x in vars(module).values() if isinstance(x, (bool, int, float, str)))
        graphable = tuple(_NONE if x is None else x for x in args)
        return recorded(module, state, graphable, {name: x for name, x in kwargs.items() if x is not None})

    return cast(_Function, call)


@no_frame_of_its_own
def compiles_what_is_called() -> bool:
    """Whether the compiler looks at functions that are called now, as inside of `torch.compile`."""
    return eval_frame.get_eval_frame_callback() not in (None, False)
