"""What torch shows of itself through private functions alone. Checked against torch 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.utils import parametrize

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
