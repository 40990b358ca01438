"""Whole blocks that are computed again in backward, from their packed input."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..compat import ACCELERATE_FORWARD, experts_implementation, is_fake
from ..config import RazorConfig
from ..extension import can_extend
from ..functional.checkpoint import packed_checkpoint
from ..functional.sharing import origin_of, pack_shared
from ..functional.stream import StoredInput, Stream
from ..packing import PackSpec
from ..targets import is_excluded, matches_block, unmatched_blocks
from .again import Changes, State, argument_names, is_mask, row_dims, without_caches
from .base import RazorModule, linear_spec

logger = logging.get_logger(__name__)

# The first input of a stream is kept nearly whole: 8 bits, with some elements exact, have a cosine of 0.9999.
FIRST_BITS = 8


class Stack:
    """Blocks that follow each other, and what their forwards share: the stream that their inputs are stored in.

    Args:
        size: how many blocks there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self._reset()

    def _reset(self) -> None:
        # One for each thread: replicas of a model share this. Only the graph keeps a stream alive.
        self._current = threading.local()
        self.streams: WeakSet[Stream] = WeakSet()

    def stream_for(self, index: int, x: Tensor) -> Stream | None:
        """The stream that the input `x` of the block at `index` continues; None if there is none.

        That is the one that the block before has just been stored in, if its inputs were like this one.
        """
        stream, last = getattr(self._current, "stream", None), getattr(self._current, "index", None)
        stream = stream() if stream is not None and last == index - 1 else None
        like = (x.shape, x.dtype, x.device)
        return stream if stream is not None and (stream.shape, stream.dtype, stream.device) == like else None

    def continue_with(self, stream: Stream, index: int) -> None:
        """Note that the block at `index` was stored in `stream`; no other stream of this thread goes on."""
        before = getattr(self._current, "stream", None)
        before = before() if before is not None else None
        if before is not None and before is not stream:
            before.end()
        self._current.stream, self._current.index = ref(stream), index
        self.streams.add(stream)
        if index == self.size - 1:
            stream.end()


class RazorBlock(RazorModule):
    """A block that is computed again in backward, by its own plain code, from its packed input.

    Attributes:
        razor_stack: the blocks that it belongs to.
        razor_index: its place among them.
        razor_follows: whether its input is stored as the difference from that of the block before; None: not known
            before its first forward.
        razor_changing: what its forward changes, as batch norms do their statistics; None: not known before the first.
        razor_experts: names of its modules that hold experts.
    """

    kind = "block"
    # FSDP and device maps know these layers by the name of their class.
    name_prefix = ""
    razor_stack: Stack
    razor_index: int
    razor_follows: bool | None
    razor_changing: Changes | None
    razor_experts: tuple[str, ...]

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`: any module can be computed again."""
        return True

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        # Put there by Accelerate, which moves inputs and weights to where they belong: part of what is computed again.
        hooked = module.__dict__.pop("forward", None)
        super().install(module, config)
        assert isinstance(module, cls)
        module.razor_instance_forward = hooked
        if hooked is not None and ACCELERATE_FORWARD in module.__dict__:
            module.__dict__[ACCELERATE_FORWARD] = MethodType(module.plain_class.forward, module)
        module.razor_stack, module.razor_index = Stack(1), 0
        module.razor_follows = module.razor_changing = None
        names = (name for name, _ in module.named_modules())
        module.razor_experts = tuple(name for name in names if name.rpartition(".")[2] == "experts")

    def clear(self) -> None:
        """See `RazorModule.clear`."""
        if (forward := self.razor_instance_forward) is not None:
            self.__dict__["forward"] = forward
        super().clear()

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: a forward with the plain one's signature."""

        @functools.wraps(extended.forward)
        def forward(self: RazorBlock, *args: Any, **kwargs: Any) -> Any:
            if not self.training or not self.razor_enabled:
                return extended.forward(self, *args, **kwargs)
            return self._forward(functools.partial(extended.forward, self), args, kwargs)

        members: dict[str, Any] = {"forward": forward}
        if hasattr(extended, "gradient_checkpointing"):
            members["gradient_checkpointing"] = property(_plain_checkpointing, _take_over)
        return members

    # A stream of inputs is nothing that a graph could hold.
    @torch.compiler.disable(reason="blocks are computed again from packed tensors")
    def _forward(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The plain forward's result; of what it saves, only its arguments are kept."""
        plain = self.razor_instance_forward or plain
        names = argument_names(self.plain_class.forward)
        x: Any = args[0] if args else kwargs.get(names[0]) if names else None
        if not self._recomputes(x, (*args, *kwargs.values())):
            return plain(*args, **kwargs)
        # Estimates ask for a cache by themselves.
        arguments = without_caches(self, names, args, kwargs, warns=not is_fake(x))
        if arguments is None:
            return plain(*args, **kwargs)
        args, kwargs = arguments
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        masks = [value for name, value in given.items() if is_mask(name, value)]
        exact = self.razor_config.stream_bits == 32 or not self.razor_config.sparsity or not self.worth_packing(x)
        exact = exact or self._loops_over_experts()
        packed = [] if exact else [(x, self._store(x))]
        before = State(self, self.razor_changing)
        result = packed_checkpoint(plain, args, kwargs, packed, masks, functools.partial(before.call, plain))
        if self.razor_changing is None and not is_fake(x):
            self.razor_changing = before.changed()
            before.keep(self.razor_changing)
        return result

    def _recomputes(self, x: Any, arguments: Iterable[Any]) -> bool:
        """Whether this call saves anything that is worth to be computed again."""
        if not isinstance(x, Tensor) or not self.training:
            return False
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        return self.razor_active(*tensors) or self.razor_active(*self.parameters())

    def _loops_over_experts(self) -> bool:
        """Whether experts run one after the other, each on the tokens that are sent to it.

        From an input that is nearly the same, a token between two experts may be sent to the other one. How many each
        gets has to be as it was, as the graph is that of the first run. Experts in one grouped product take any.
        """
        experts = [self.get_submodule(name) for name in self.razor_experts]
        configs = (getattr(each, "config", None) for each in experts)
        loops = any(experts_implementation(config) == "eager" for config in configs)
        if loops:
            logger.warning_once(
                "razor: blocks whose experts run one after the other keep their input as it is; "
                '`model.set_experts_implementation("grouped_mm")`, where the model has it, lets it be packed'
            )
        return loops

    def _store(self, x: Tensor) -> Callable[[], Tensor]:
        """Store `x`, and say how it is restored."""
        if origin_of(x) is not None:
            # A norm's output, as an MLP is given: the norm's own copy serves.
            return StoredInput(0, pack_shared(x, linear_spec(self.razor_config, x))).unpack
        stack, index = self.razor_stack, self.razor_index
        stream = None if self.razor_follows is False else stack.stream_for(index, x)
        if stream is not None and self.razor_follows is None and not is_fake(x) and not x.is_meta:
            # Where stages change, inputs may have nothing in common. Looked at once, as the host waits for the answer.
            self.razor_follows = stream.is_like(x)
            stream = stream if self.razor_follows else None
        bits = self.razor_config.stream_bits if stream is not None else FIRST_BITS
        stream = Stream(x) if stream is None else stream
        stored = stream.append(x, self._spec(x, bits))
        stack.continue_with(stream, index)
        return functools.partial(stream.restore, stored)

    def _spec(self, x: Tensor, bits: int) -> PackSpec:
        config = self.razor_config
        dims = row_dims(self, x)
        return PackSpec(config.sparsity, "row", bits, config.value_dtype, row_dims=dims, rotated=bits <= 4)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        bits = self.razor_config.stream_bits
        return "razor=computed again from its input" + (f" in {bits} bits" if bits < 32 else "")


def find_blocks(model: nn.Module, config: RazorConfig) -> dict[str, nn.Module]:
    """Names and modules of the blocks that are to be computed again: of those inside of each other, the innermost.

    Raises:
        ValueError: there are none.
    """
    kinds = {name: _kinds(module) for name, module in model.named_modules()}
    if unmatched := unmatched_blocks(config, [*kinds, *(kind for each in kinds.values() for kind in each)]):
        raise ValueError(f"no module of this {type(model).__name__} is matched by " + "; ".join(unmatched))
    found = {
        name: module for name, module in model.named_modules() if name and matches_block(config, name, *kinds[name])
    }
    outer = {name[:end] for name in found for end, letter in enumerate(name) if letter == "."}
    found = {name: module for name, module in found.items() if name not in outer and not is_excluded(config, name)}
    if not found:
        raise ValueError(
            f'recompute="blocks": this {type(model).__name__} has no blocks of Transformers\' '
            "(GradientCheckpointingLayer) that are not excluded; name those to compute again by `recompute_modules`: "
            "by their class or their own names"
        )
    if fixed := [name for name, module in found.items() if not can_extend(module, RazorBlock)]:
        raise ValueError(
            f"{fixed[0]} ({type(found[fixed[0]]).__name__}) cannot be extended: expected nn.Module before classes such "
            "as ABC or Generic among the bases of its class"
        )
    return found


def _kinds(module: nn.Module) -> list[str]:
    """Names of the module's classes."""
    return [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]


def stack_blocks(blocks: Mapping[str, RazorBlock]) -> None:
    """Let blocks that belong to the same list of modules store their inputs in one stream.

    Args:
        blocks: by their names in the model.
    """
    stacks: dict[str, list[RazorBlock]] = defaultdict(list)
    for name, block in blocks.items():
        stacks[name.rpartition(".")[0]].append(block)
    for members in stacks.values():
        stack = Stack(len(members))
        for index, block in enumerate(members):
            block.razor_stack, block.razor_index = stack, index


def running_sums(model: nn.Module) -> dict[Stream, tuple[str, int]]:
    """The streams of `model` that are alive, each with a block it belongs to, and the bytes of its running sum.

    That is a tensor which changes in backward, and so is none that autograd saves.
    """
    found: dict[Stream, tuple[str, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RazorBlock):
            for stream in module.razor_stack.streams:
                found.setdefault(stream, (name, stream.sum_bytes))
    return found


def _plain_checkpointing(block: RazorBlock) -> bool:
    """What model code reads as `gradient_checkpointing`: with razor, the block is checkpointed already."""
    return block.__dict__.get("gradient_checkpointing", False) and not block.razor_enabled


def _take_over(block: RazorBlock, value: bool) -> None:
    if value:
        logger.warning_once(
            "razor: `gradient_checkpointing` is taken over: blocks are computed again from their packed input as it is "
            '(`recompute="blocks"`), and not a second time'
        )
    block.__dict__["gradient_checkpointing"] = value
