"""Activation checkpointing that packs what it keeps: a block is computed again from its packed input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..compat import TreeSpec, tree_flatten, tree_unflatten
from .masks import PackedMask, pack_mask


def packed_checkpoint(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    packed: Sequence[tuple[Tensor, Callable[[], Tensor]]] = (),
    masks: Sequence[Tensor] = (),
    again: Callable[..., Any] | None = None,
) -> Any:
    """Call `function`, and keep for backward nothing but its arguments; some of them packed.

    Backward calls it once more, with what is restored of the packed ones, and goes on through what this call has saved:
    non-reentrant `torch.utils.checkpoint`, with its replayed random numbers, autocast state and checks. The result is
    that of a plain call.

    Args:
        function: a module's plain forward.
        args: its arguments.
        kwargs: its arguments by name.
        packed: those among them that are packed, each with what gives it again.
        masks: those among the arguments that are attention masks, and are packed (see `pack_mask`). All other tensors
            are kept as they are; what several blocks are given is kept once.
        again: called in place of `function` in backward (default: `function`).
    """
    leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
    call = _Call(function, again or function, leaves, tree, packed, masks)
    return checkpoint(call, *call.kept, use_reentrant=False)


class _Call:
    """A call that can be made again from what is kept of its arguments.

    Attributes:
        kept: tensors that stand for those among the arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        again: Callable[..., Any],
        leaves: list[Any],
        tree: TreeSpec,
        packed: Sequence[tuple[Tensor, Callable[[], Tensor]]],
        masks: Sequence[Tensor],
    ) -> None:
        self._function, self._again, self._tree = function, again, tree
        self._first: list[Any] | None = leaves
        restored = {id(x): _Packed(x, restore) for x, restore in packed}
        packed_masks = {id(mask): pack_mask(mask) for mask in masks}
        self._leaves: list[Any] = []
        self.kept: list[Tensor] = []
        # Each tensor once, so that several arguments that are one will be one again: multi-head attention looks.
        places: dict[int, _Kept] = {}
        for leaf in leaves:
            if id(leaf) in restored:
                self._leaves.append(restored[id(leaf)])
            elif isinstance(leaf, Tensor):
                if id(leaf) not in places:
                    mask = packed_masks.get(id(leaf))
                    places[id(leaf)] = _Kept(len(self.kept), mask)
                    self.kept.append(leaf if mask is None else mask.part)
                self._leaves.append(places[id(leaf)])
            else:
                self._leaves.append(leaf)

    def __call__(self, *kept: Tensor) -> Any:
        # The arguments themselves, once: they are not to live as long as this.
        leaves, self._first = self._first, None
        function = self._function
        if leaves is None:
            leaves, function = self._restored(kept), self._again
        args, kwargs = tree_unflatten(leaves, self._tree)
        del leaves
        return function(*args, **kwargs)

    def _restored(self, kept: Sequence[Tensor]) -> list[Any]:
        # Each once: one tensor may be several arguments.
        again = {leaf: leaf.restored() for leaf in self._leaves if isinstance(leaf, _Packed)}
        leaves = [again[leaf] if isinstance(leaf, _Packed) else leaf for leaf in self._leaves]
        return [leaf.of(kept) if isinstance(leaf, _Kept) else leaf for leaf in leaves]


class _Packed:
    """The place of a tensor that is packed."""

    def __init__(self, x: Tensor, restore: Callable[[], Tensor]) -> None:
        self._restore, self._requires_grad = restore, x.requires_grad
        self._strides = None if x.is_contiguous() else x.stride()

    def restored(self) -> Tensor:
        """What is restored of the tensor."""
        with torch.no_grad():
            x = self._restore()
            # Operators of torch go other ways for other strides, and save other things on these.
            x = x if self._strides is None else _with_strides(x, self._strides)
        return x.requires_grad_(self._requires_grad)


class _Kept:
    """The place of a tensor among those that are kept, and how it is read there."""

    def __init__(self, place: int, mask: PackedMask | None) -> None:
        self._place = place
        # Blocks above find and share what this keeps alive.
        self._mask = mask

    def of(self, kept: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        tensor = kept[self._place]
        return tensor if self._mask is None else self._mask.layout.unpack(tensor)


def _with_strides(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x` laid out with these strides; as it is if elements that are not the same would lie at one place."""
    shape = x.shape
    for dim, stride in enumerate(strides):
        if stride == 0 and shape[dim]:
            x = x.narrow(dim, 0, 1)  # of what was expanded, all are the same
    reach = 0
    for stride, size in sorted(zip(strides, x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return x.expand(shape)
        reach += (size - 1) * stride
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x).expand(shape)
