"""Tensors that know how they are computed, and are not computed yet.

A lazy tensor is the output of one autograd function, so that whatever is done with it leaves the gradient that the
plain code would leave. Its elements are computed once, when an operator reads them. Views, casts and a few other
operators are put off as well. A function that has a cheaper way to its result than the elements takes that way, as long
as nobody can tell the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import DisableTorchFunctionSubclass, make_wrapper_tensor, parse_to, schema_of, tree_leaves, tree_map
from ..functional.precision import current_autocast
from .elements import Computation, Elements


class _Deferred(torch.autograd.Function):
    """The one place of a lazy tensor in the graph: between it and the inputs of its computation."""

    @staticmethod
    def forward(ctx: Any, computation: Computation, make: Callable[[], LazyTensor], *inputs: Tensor | None) -> Tensor:
        ctx.computation = computation
        ctx.set_materialize_grads(False)
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needed))
        ctx.computation.require_same_versions()
        return None, None, *ctx.computation.gradients(grad, needed)


class _Whole(torch.autograd.Function):
    """From a lazy tensor to a plain one in the same memory."""

    @staticmethod
    def forward(ctx: Any, x: LazyTensor, asked_by: str) -> Tensor:
        return x._elements.handed_out(asked_by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Step(torch.autograd.Function):
    """`function(x)` of a lazy tensor, where autograd would save the result: for a tensor that may never be computed."""

    @staticmethod
    def forward(ctx: Any, x: LazyTensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.x, ctx.version, ctx.function = x, x._version, function
        ctx.autocast = current_autocast(x.device.type)
        ctx.set_materialize_grads(False)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        x = ctx.x
        if x._version != ctx.version:
            raise RuntimeError(
                "logits that a gradient is computed from have been modified by an inplace operation: change a clone"
            )
        with DisableTorchFunctionSubclass():
            with torch.enable_grad(), ctx.autocast:
                x = x.view_as(x)
                y = ctx.function(x)
            (grad,) = torch.autograd.grad(y, x, grad, create_graph=torch.is_grad_enabled())
        return grad, None


class Description:
    """What a lazy tensor stands for, in terms that lead to results without its elements.

    Attributes:
        steps: function of torch -> what takes the same arguments and returns the description of its result.
        results: function of torch -> what takes the same arguments and returns its result.
        computation: of the elements of the tensor that the first description was of.

    The first argument is the lazy tensor; both may return `NotImplemented`.
    """

    steps: ClassVar[Mapping[Any, Callable[..., Any]]] = {}
    results: ClassVar[Mapping[Any, Callable[..., Any]]] = {}
    if TYPE_CHECKING:  # a field of some, a property of others

        @property
        def computation(self) -> Computation: ...

    def call_before_backward(self, hook: Callable[[Tensor], Any]) -> None:
        """Have results call `hook` before their backward: FSDP gathers weights there."""


class LazyTensor(Tensor):
    """A tensor without elements, until they are read.

    Values, dtypes, errors and gradients are those of the dense tensor, whoever uses it: functions of torch, autograd
    functions, compiled or scripted code, hooks, changes in place. A result that its description has a way to is taken
    that way only where the tensor is as it was made: nothing was written to it, no hook looks at its gradient, and no
    other function stands between it and the inputs. After that a hook that would never be called, and a gradient that
    never arrives, are errors, and so are elements that are first read when a weight has changed.

    `shape`, `dtype` and all else that is not elements is there at once.

    Attributes:
        description: a `Description` that leads to results without elements, or None.
    """

    description: Any
    _elements: Elements
    # In what state of the tensor its description holds, and the tensor that it came from.
    _state: tuple[Any, int]
    _source: LazyTensor | None
    # Whether somebody may look at the gradient; whether a result was taken past this tensor.
    _watched: bool
    _passed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def deferred(cls, description: Description, like: Tensor) -> Any:
        """A new lazy tensor.

        Args:
            description: with the computation of its elements.
            like: a tensor, of any device, that has its shape, strides and dtype.
        """
        computation = description.computation
        device = computation.inputs[0].device
        elements = Elements(computation.elements)

        def make() -> LazyTensor:
            return cls._wrap(elements, like, device)

        self = _Deferred.apply(computation, make, *computation.inputs)
        self._describe(description, None)
        return self

    @classmethod
    def _wrap(cls, elements: Elements, like: Tensor, device: torch.device, offset: Any = 0) -> LazyTensor:
        self = make_wrapper_tensor(
            cls, like.shape, like.stride(), like.storage_offset() + offset, dtype=like.dtype, device=device
        )
        self._elements, self.description, self._source = elements, None, None
        self._watched = self._passed = False
        return self

    def _describe(self, description: Description, source: LazyTensor | None) -> None:
        self.description, self._source, self._state = description, source, self._current_state()

    def _current_state(self) -> tuple[Any, int]:
        with DisableTorchFunctionSubclass():
            return self.grad_fn, self._version

    def _as_described(self) -> bool:
        """Whether the description may be used: nobody could tell."""
        return (
            self.description is not None
            and not self._watched
            and self._state == self._current_state()
            and (self._source is None or self._source._as_described())
        )

    def _pass_by(self) -> None:
        self._passed = True
        if self._source is not None:
            self._source._pass_by()

    def _watch(self, how: str) -> None:
        if self._passed:
            raise RuntimeError(
                f"`{how}` comes too late: a loss of {self.description.computation.name} was taken without computing "
                "them, and no gradient passes through them; call `retain_grad` or `register_hook` before the loss"
            )
        self._watched = True

    def _as_described_or_plainly(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        description = self.description
        take, step = description.results.get(func), description.steps.get(func)
        if _accepts(take, args, kwargs) and self._as_described() and description.computation.unchanged():
            # Where an input has changed, elements that are there are still right, and others tell that.
            result = take(*args, **kwargs)
            if result is not NotImplemented:
                # Parts of this tensor are lazy as well.
                if torch.is_grad_enabled() and isinstance(result, Tensor) and result.requires_grad:
                    self._pass_by()
                return result
        if not _accepts(step, args, kwargs) or not self._as_described():
            return _plainly(func, args, kwargs)
        described = step(*args, **kwargs)
        if described is NotImplemented:
            return _plainly(func, args, kwargs)
        if func in _SAVES_ITS_RESULT:
            result = _Step.apply(self, lambda x: _plainly(func, (x, *args[1:]), kwargs))
        else:
            result = _plainly(func, args, kwargs)
        if isinstance(result, LazyTensor) and result is not self:
            result._describe(described, self)
        return result

    # A compiled loss breaks its graph at each function of a lazy tensor, and goes on with the dense result.
    @classmethod
    @torch.compiler.disable(reason="the elements of lazy tensors are computed when they are read")
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], LazyTensor) else None
        if func is torch.autograd.grad:
            for y in tree_leaves(args[1:2]):
                if isinstance(y, LazyTensor):
                    y._watch("torch.autograd.grad")
        if x is not None:
            if func in _LOOKS_AT_GRADIENT:
                if not (func == Tensor.register_hook and _register_gathering(x, *args[1:], **kwargs)):
                    x._watch(_name(func))
            elif func == _GRAD_FN:
                x._watched = True  # its hooks are as good as the tensor's
            elif func in _READS_MEMORY:
                x._watched = True
                return func(*(_whole(y, _name(func)) for y in args), **kwargs)
            elif func in _DETACHES:
                x._elements.get(_name(func))
                # Writing to `.data` makes no new version.
                x._watched = x._watched or func == _DATA
            elif x.description is not None:
                return x._as_described_or_plainly(func, args, kwargs)
        return _plainly(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares another signature than it calls
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = schema_of(func)
        name = schema.name.split("::")[-1]
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError(f"`{name}` gives logits that razor returned another shape in place: do it out of place")
        if func in _VIEWS or func in _COPIES:
            result = _put_off(func, args, kwargs)
            if result is not NotImplemented:
                return result
        lazy = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyTensor)]
        if schema.is_mutable or any(value.alias_info is not None for value in schema.returns):
            for x in lazy:
                x._elements.share()
        owners = {id(x._elements.get(name)): x for x in lazy}

        def values(x: Any) -> Any:
            return x._elements.get(name) if isinstance(x, LazyTensor) else x

        result = func(*tree_map(values, args), **tree_map(values, kwargs))
        # What was written to is returned as itself.
        return tree_map(lambda x: owners.get(id(x), x) if isinstance(x, Tensor) else x, result)


def _plainly(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """As for any tensor; autograd sees the lazy ones, and the elements are asked for below it."""
    with DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _accepts(function: Callable[..., Any] | None, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether there is such a function, and it knows these arguments."""
    if function is None:
        return False
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _whole(x: Any, asked_by: str) -> Any:
    return _Whole.apply(x, asked_by) if isinstance(x, LazyTensor) else x


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _register_gathering(x: LazyTensor, hook: Callable[[Tensor], Any], **kwargs: Any) -> bool:
    # FSDP's hooks look at no gradient: they run before the backward of a module's output, to gather its weights.
    function = getattr(hook, "func", hook)
    if not (getattr(function, "__module__", None) or "").startswith("torch.distributed.fsdp"):
        return False
    if x.description is not None:
        x.description.call_before_backward(hook)
    return True


def _put_off(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The lazy result of a view or copy of a lazy tensor; `NotImplemented` if it takes more than that one."""
    x, *others = args
    small = all(not isinstance(y, LazyTensor) and y.numel() <= x.shape[-1] for y in others if isinstance(y, Tensor))
    if not isinstance(x, LazyTensor) or not small or kwargs.get("device") not in (None, x.device):
        return NotImplemented
    if func is torch.ops.aten.detach.default and x._elements.there:
        return x._elements.handed_out("detach")
    others = [y.detach().clone() if isinstance(y, Tensor) else y for y in others]
    # On the meta device everything but the elements is found out.
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    sizes = [torch.empty_like(y, device="meta") if isinstance(y, Tensor) else y for y in others]
    like = func(meta, *sizes, **{key: value for key, value in kwargs.items() if key != "device"})
    view = func in _VIEWS

    def compute(values: Tensor) -> Tensor:
        with torch.no_grad():
            return func(values, *others, **kwargs)

    return type(x)._wrap(x._elements.then(compute, view), like, x.device, x.storage_offset() if view else 0)


def widened_dtype(x: Tensor, *args: Any, **kwargs: Any) -> torch.dtype | None:
    """The dtype that `x.to(...)` with these arguments has; None if that is more than a cast that changes no value.

    Args:
        x: any tensor that has the dtype and device, on "meta" for instance.
    """
    if any(isinstance(argument, Tensor) for argument in args) or kwargs.get("copy"):
        return None
    device, dtype, _, memory_format = parse_to(*args, **kwargs)
    if memory_format is not None or (device is not None and device != x.device):
        return None
    if dtype is None or dtype == x.dtype:
        return x.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > x.dtype.itemsize else None


_ATTRIBUTES: Any = Tensor  # type checkers take them for values
_GRAD_FN = _ATTRIBUTES.grad_fn.__get__
_LOOKS_AT_GRADIENT = frozenset((Tensor.register_hook, Tensor.retain_grad, _ATTRIBUTES.grad.__get__))
_SAVES_ITS_RESULT = frozenset((torch.tanh, Tensor.tanh, F.log_softmax, torch.log_softmax, Tensor.log_softmax))
_DATA = _ATTRIBUTES.data.__get__
_DETACHES = frozenset((Tensor.detach, torch.detach, _DATA))
_READS_MEMORY = frozenset(
    function
    for name in (
        *(
            "numpy",
            "tolist",
            "data_ptr",
            "untyped_storage",
            "storage",
            "_typed_storage",
            "storage_type",
            "share_memory_",
        ),
        *("__array__", "__dlpack__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__repr__", "__format__"),
        *("apply_", "map_", "map2_", "is_shared", "dim_order"),
    )
    if (function := getattr(Tensor, name, None)) is not None
)

_aten = torch.ops.aten
# Of what models, losses and wrappers of modules do to logits, what can wait.
_VIEWS = frozenset(
    (
        *(_aten.view.default, _aten._reshape_alias.default, _aten.alias.default, _aten.detach.default),
        *(_aten.slice.Tensor, _aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim),
    )
)
_COPIES = frozenset(
    (
        *(
            _aten.clone.default,
            _aten._to_copy.default,
            _aten._unsafe_view.default,
            _aten.tanh.default,
            _aten.neg.default,
        ),
        *(_aten.mul.Tensor, _aten.div.Tensor, _aten.add.Tensor, _aten._log_softmax.default),
    )
)
