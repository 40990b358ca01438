"""Attention: q, k and v packed, and the probabilities either recomputed from them or packed as well.

Neither form depends on how the forward is computed: the caller brings the attention function, whose output is
returned as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Layout, PackSpec, pack
from .differentiation import once_differentiable, restored, saved_parts, twice_differentiable
from .masks import pack_mask
from .precision import current_autocast
from .rng import drawing_again, noting_draws


def recomputed_attention(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: Sequence[Tensor],
    spec: PackSpec,
    random: bool,
) -> Tensor:
    """Attention that saves packed q, k, v and runs `attend` again in backward.

    Memory is linear in sequence length, as far as the `others` are (see `pack_mask`). The gradient is exactly that of
    `attend` at the unpacked q, k, v, for the dropout mask that the forward drew.

    Args:
        attend: `attend(query, key, value, *others)` gives the output.
        query: float, `(batch, heads, length, head_dim)`.
        key: float, as `query`; its heads and length may differ.
        value: float, as `key`.
        others: all other tensors that `attend` depends on (masks, position biases, sinks, parameters). Masks are packed
            (see `pack_mask`), the rest is saved as it is; those that require a gradient get one.
        spec: how q, k and v are packed.
        random: `attend` draws random numbers.

    Returns:
        What `attend` returns.
    """
    return _RecomputedAttention.apply(attend, spec, random, query, key, value, *others)


class _RecomputedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[..., Tensor],
        spec: PackSpec,
        random: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        packed = [pack(x, spec) for x in (query, key, value)]
        ctx.attend = attend
        ctx.autocast = current_autocast(query.device.type)
        ctx.layouts = [(p.layout, len(p.parts)) for p in packed]
        parts = [part for x, p in zip((query, key, value), packed, strict=True) for part in saved_parts(x, p)]
        masks = [pack_mask(x) for x in others]
        ctx.mask_layouts = [mask.layout for mask in masks]
        # Layers above find and share what this keeps alive.
        ctx.shared = [mask for mask in masks if mask.layout.form != "whole"]
        rng: list[Tensor] = []
        with noting_draws(query, _scores(query, key), rng) if random else nullcontext():
            output = attend(query, key, value, *others).detach()  # no view (see `_Linear`)
        ctx.draws = len(rng)
        ctx.save_for_backward(*rng, *(mask.part for mask in masks), *parts)
        return output

    @staticmethod
    @twice_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        rng, saved = saved[: ctx.draws], saved[ctx.draws :]
        count = len(ctx.mask_layouts)
        others = [layout.unpack(part) for layout, part in zip(ctx.mask_layouts, saved[:count], strict=True)]
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        if again:
            inputs = [x.view_as(x) for x in (*_restore_all(ctx.layouts, saved[count:], needed), *others)]
        else:
            inputs = [x.detach() for x in (*_unpack_all(ctx.layouts, saved[count:]), *others)]
            for x, wanted in zip(inputs, needed, strict=True):
                x.requires_grad_(wanted)
        with torch.enable_grad(), ctx.autocast, drawing_again(grad_output, _scores(*inputs[:2]), rng):
            output = ctx.attend(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=again, allow_unused=True))
        return None, None, None, *(next(grads) if x.requires_grad else None for x in inputs)


def sparse_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    is_causal: bool,
    dropout_p: float,
    spec: PackSpec,
) -> Tensor:
    """Attention as the paper saves it: the probabilities, q, k and v, each packed.

    With P the packed probabilities, D the dropout mask over its keeping probability, and dO the output's gradient:
    dV = (P D)^T dO, dP = (dO V^T) D, dS = P (dP - sum(dP P)), dQ = scaling dS K, dK = scaling dS^T Q. D is drawn
    again from the generator's state. Probabilities are computed once more to be packed where `attend` does not show
    them, so this form costs time as well as memory quadratic in sequence length; it is here for fidelity to the paper.

    Args:
        attend: `attend(query, key, value)` gives the output `(batch, length, heads, head_dim)`. Its dropout must be
            one call of `torch.nn.functional.dropout` on the probabilities, as it is in eager attention and in SDPA's
            math path.
        query: float, `(batch, heads, length, head_dim)`.
        key: float, `(batch, kv_heads, kv_length, head_dim)`, with `heads` a multiple of `kv_heads`.
        value: as `key`.
        mask: bool (true: attend) or float (added; may require a gradient), broadcastable to `(batch, heads, length,
            kv_length)`, or None.
        scaling: of the scores.
        is_causal: no attention to later positions.
        dropout_p: probability that `attend` drops a probability with.
        spec: how all four are packed.
    """
    return _SparseAttention.apply(attend, query, key, value, mask, scaling, is_causal, dropout_p, spec)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        is_causal: bool,
        dropout_p: float,
        spec: PackSpec,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.groups = query.shape[1] // key.shape[1]
        probabilities = _probabilities(query, _repeat_heads(key, ctx.groups), mask, scaling, is_causal)
        packed = [pack(x, spec) for x in (probabilities, query, key, value)]
        del probabilities
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.mask_shape = None if mask is None else mask.shape
        ctx.layouts = [(p.layout, len(p.parts)) for p in packed]
        rng: list[Tensor] = []
        with noting_draws(query, _scores(query, key), rng) if dropout_p else nullcontext():
            output = attend(query, key, value)
        ctx.draws = len(rng)
        ctx.save_for_backward(*rng, *(part for p in packed for part in p.parts))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        rng, saved = saved[: ctx.draws], saved[ctx.draws :]
        probabilities, query, key, value = _unpack_all(ctx.layouts, saved)
        key, value = _repeat_heads(key, ctx.groups), _repeat_heads(value, ctx.groups)
        grad_output = grad_output.transpose(1, 2).to(query.dtype)
        grad_probabilities = grad_output @ value.transpose(-1, -2)
        dropped = probabilities
        if ctx.dropout_p:
            with drawing_again(grad_output, probabilities.numel(), rng):
                noise = F.dropout(torch.ones_like(probabilities), ctx.dropout_p)
            grad_probabilities *= noise
            dropped = probabilities * noise
        grad_value = dropped.transpose(-1, -2) @ grad_output
        grad_scores = grad_probabilities.mul_(probabilities)
        grad_scores -= probabilities * grad_scores.sum(-1, keepdim=True)
        grad_mask = grad_scores.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[4] else None
        grad_scores = grad_scores * ctx.scaling
        grad_query = grad_scores @ key
        grad_key = grad_scores.transpose(-1, -2) @ query
        return (
            None,
            grad_query,
            _sum_heads(grad_key, ctx.groups),
            _sum_heads(grad_value, ctx.groups),
            grad_mask,
            *(None,) * 4,
        )


def _unpack_all(layouts: list[tuple[Layout, int]], parts: list[Tensor]) -> list[Tensor]:
    """Unpack several tensors whose parts follow each other."""
    dense = []
    for layout, count in layouts:
        dense.append(layout.unpack(tuple(parts[:count])).detach())
        parts = parts[count:]
    return dense


def _restore_all(layouts: list[tuple[Layout, int]], parts: list[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """As `_unpack_all`, for a gradient that is to be differentiated."""
    dense = []
    for (layout, count), needed in zip(layouts, needs_grad, strict=False):
        dense.append(restored(layout, tuple(parts[:count]), constant=not needed))
        parts = parts[count:]
    return dense


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, is_causal: bool) -> Tensor:
    """Softmax of the masked scores, in the dtype of `query`. A row that may attend to nothing is zero."""
    scores = (query @ key.transpose(-1, -2)).float() if query.dtype.itemsize < 4 else query @ key.transpose(-1, -2)
    scores *= scaling
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores += mask
    return torch.softmax(scores, -1).nan_to_num_(0.0).to(query.dtype)


def _scores(query: Tensor, key: Tensor) -> int:
    """How many probabilities there are."""
    return query.shape[:-1].numel() * key.shape[-2]


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Grouped-query attention: every key or value head serves `groups` query heads that follow each other."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_heads(grad: Tensor, groups: int) -> Tensor:
    """The gradient of `_repeat_heads`."""
    return grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2)
