"""What a backward owes autograd beyond the gradient: to be differentiated again, or to say that it cannot.

With `create_graph=True` autograd runs a backward with gradients enabled, and differentiates what it computed. A
backward that reads a packed copy cannot give that derivative: the copy is no function of the graph any more, and what
is computed from it would pass for a constant. Every backward in this folder is therefore of one of these kinds, and
says which:

- `@once_differentiable`: with `create_graph=True` it raises RuntimeError.
- `@replayed`: the same, except where the input is stored as it is: then the gradient is computed again in operators of
  torch.
- `@twice_differentiable`: it is written in operators that autograd differentiates, and takes what was saved from
  `restored`. Tensors that are stored as they are come back as part of the graph; what would have to be unpacked raises
  RuntimeError. So the gradient of a linear layer's input can always be differentiated again, and that of its weight
  where the input is stored whole.

With `ctx.set_materialize_grads(False)` in the forward, a gradient that is not there stays so: the backward is not run.

Errors are raised at once, and not when somebody differentiates: `torch.autograd.grad` leaves out whatever is not on the
way to the tensors that it is asked for, an error as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..compat import is_batched, will_be_executed
from ..packing import Layout, Packed, SparseLayout

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """Mark a backward whose results cannot be differentiated: it raises RuntimeError where they are to be."""
    name = _name(backward)

    @wraps(backward)
    def refusing(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            _refuse(f"the backward of {name}")
        return backward(ctx, *grads)

    return _marked(twice_differentiable(refusing), False)


def replayed(replay: Backward) -> Callable[[Backward], Backward]:
    """As `once_differentiable`, but for what `replay` can do.

    Args:
        replay: as the backward, in operators that autograd differentiates. It is called in place of the backward where
            the gradient is to be differentiated, and returns NotImplemented, with `ctx.saved_tensors` not read, where
            what was stored does not allow for it.
    """

    def mark(backward: Backward) -> Backward:
        once = once_differentiable(backward)

        @wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled() and any(grad is not None for grad in grads):
                results = replay(ctx, *grads)
                if results is not NotImplemented:
                    return results
            return once(ctx, *grads)

        return _marked(checked, True)

    return mark


def twice_differentiable(backward: Backward) -> Backward:
    """Mark a backward that autograd can differentiate, as far as it reads nothing that was packed (see `restored`)."""
    name = _name(backward)

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return _nothing(ctx)
        _refuse_batches(name, grads)
        return backward(ctx, *grads)

    return _marked(checked, True)


def saved_parts(x: Tensor, packed: Packed) -> tuple[Tensor, ...]:
    """What to give to `ctx.save_for_backward` for `packed`, a copy of the operator's input `x`.

    Its parts; but where `x` is stored as it is, `x` itself, which comes back as part of the graph.
    """
    layout, parts = packed
    is_input = isinstance(layout, SparseLayout) and layout.whole and not x.is_meta and parts[0].is_set_to(x)
    return (x,) if is_input else parts


def restored(
    layout: Layout, parts: Sequence[Tensor], dtype: torch.dtype | None = None, constant: bool = False
) -> Tensor:
    """The whole tensor for a gradient that is to be differentiated.

    Args:
        layout: how to read it.
        parts: what `saved_parts` returned, saved by autograd in between.
        dtype: of the result (default: the one that the tensor had).
        constant: the tensor required no gradient.

    Returns:
        The tensor, of the layout's shape: part of the graph, unless it is constant.

    Raises:
        RuntimeError: it is not constant, and was not stored as it is.
    """
    if isinstance(layout, SparseLayout) and layout.whole and parts[0].requires_grad:
        return parts[0].to(dtype or layout.dtype)
    if not constant:
        _refuse("a gradient that reads a packed activation")
    with torch.no_grad():
        return layout.unpack(parts, dtype)


def is_wanted(ctx: Any, index: int) -> bool:
    """Whether this run of autograd needs the gradient of the input at place `index` among those that are tensors.

    `ctx.needs_input_grad` says so of any run. A gradient penalty asks for the input's gradient, and not the weights'.
    """
    node = ctx.next_functions[index][0]
    return node is not None and will_be_executed(node)


def replayed_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)`, computed once more, that can be differentiated again.

    Args:
        function: plain code of torch.
        inputs: its arguments; None where there is none.
        grad_output: of its result's shape.

    Returns:
        For each input its gradient, or None if it requires none.
    """
    # Aliases, as autograd would run the hooks of the inputs themselves here and in the backward around this.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    output = function(*aliases)
    wanted = [x for x in aliases if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True, allow_unused=True))
    return [next(grads) if x is not None and x.requires_grad else None for x in aliases]


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"razor: {what} is asked for a gradient that can be differentiated again (create_graph=True), and has none. "
        "Run the forward of what is differentiated twice inside of `model.disable_razor()`, or leave these layers out "
        'by `exclude_modules`; with `RazorConfig.preset("lossless")` most operators support it'
    )


def _nothing(ctx: Any) -> tuple[None, ...]:
    """No gradient comes from no gradient; zeros would make optimizers move."""
    return (None,) * len(ctx.needs_input_grad)


def _marked(backward: Any, differentiable: bool) -> Backward:
    backward.differentiable = differentiable
    return backward


def _name(backward: Backward) -> str:
    return backward.__qualname__.split(".")[-2].lstrip("_")


def _refuse_batches(name: str, grads: Sequence[Tensor | None]) -> None:
    if any(isinstance(x, Tensor) and is_batched(x) for x in grads):
        raise RuntimeError(
            f"razor: the backward of {name} takes one gradient at a time, not a batch of them "
            "(`is_grads_batched=True`, `torch.vmap`, a vectorized Jacobian); take them one after the other, or run the "
            "forward inside of `model.disable_razor()`"
        )
