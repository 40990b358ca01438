"""Some outputs of a linear layer, a few for each token, without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..shapes_only import turns
from .differentiation import once_differentiable
from .labels import check_labels
from .precision import accumulate_dtype, compute_dtype

# Elements of the rows of the weight that are there at once.
CHUNK_NUMEL = 2**22


def linear_gather(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """`linear(hidden, weight, bias).gather(-1, index)`, from the rows of the weight that `index` names.

    Args:
        hidden: `(tokens, features)`, float.
        weight: `(classes, features)`.
        bias: `(classes,)` or None.
        index: `(tokens, chosen)`, int64.

    Returns:
        `(tokens, chosen)`, in the dtype of the linear layer's output.

    Raises:
        IndexError: an index is not a class; on a GPU an assertion fails there instead.
    """
    check_labels(index, weight.shape[0], torch.ones_like(index, dtype=torch.bool))
    return _LinearGather.apply(hidden, weight, bias, index, compute_dtype(hidden))


class _LinearGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(hidden, weight, index)
        z = hidden.new_empty(index.shape, dtype=accumulate_dtype(hidden))
        for tokens in _chunks(hidden, index):
            rows = weight[index[tokens]].to(dtype).to(z.dtype)
            z[tokens] = torch.einsum("tf,tcf->tc", hidden[tokens].to(dtype).to(z.dtype), rows)
        if bias is not None:
            z += bias[index].to(dtype)
        return z.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, index = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = accumulate_dtype(hidden)
        grad = grad_output.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = None
        for tokens in _chunks(hidden, index):
            part, chosen = grad[tokens], index[tokens]
            if grad_hidden is not None:
                rows = weight[chosen].to(ctx.dtype).to(dtype)
                grad_hidden[tokens] = torch.einsum("tc,tcf->tf", part, rows).to(hidden.dtype)
            if grad_weight is not None:
                outer = part.unsqueeze(-1) * hidden[tokens].to(ctx.dtype).to(dtype).unsqueeze(1)
                grad_weight.index_add_(0, chosen.reshape(-1), outer.flatten(0, 1))
        if needs_bias:
            grad_bias = grad.new_zeros(weight.shape[0]).index_add_(0, index.reshape(-1), grad.reshape(-1))
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, None, None


def _chunks(hidden: Tensor, index: Tensor) -> Sequence[slice]:
    """Slices of tokens that together cover all; in an estimate, the first ones (see `turns`)."""
    tokens, chosen = index.shape
    high = max(1, CHUNK_NUMEL // max(1, chosen * hidden.shape[1]))
    return turns([slice(first, min(first + high, tokens)) for first in range(0, tokens, high)], hidden)
