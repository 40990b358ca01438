"""What random programs are made of beside torch's own modules: layers of Transformers, and losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding


class Bert(nn.Module):
    """A layer of BERT, `(batch, tokens, width)`; `width` is even."""

    def __init__(self, width: int, dropout: float = 0.0, attention: str = "sdpa") -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=width,
            num_attention_heads=2,
            intermediate_size=2 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        config._attn_implementation = attention
        self.layer = BertLayer(config)

    def forward(self, x: Tensor) -> Tensor:
        return _first(self.layer(x))


class GPT2(nn.Module):
    """A block of GPT-2, `(batch, tokens, width)`; `width` is even."""

    def __init__(self, width: int, dropout: float = 0.0, attention: str = "sdpa") -> None:
        super().__init__()
        config = GPT2Config(n_embd=width, n_head=2, resid_pdrop=dropout, attn_pdrop=dropout)
        config._attn_implementation = attention
        self.layer = GPT2Block(config, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return _first(self.layer(x))


class Llama(nn.Module):
    """A layer of Llama with one key and value head for two queries, `(batch, tokens, width)`; `width` is 4 n."""

    def __init__(self, width: int, dropout: float = 0.0, attention: str = "sdpa") -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=2 * width,
            attention_dropout=dropout,
        )
        config._attn_implementation = attention
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        return _first(self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions)))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class copied_to_cpu(saved_tensors_hooks):
    """As `save_on_cpu`, which of a tensor on a CPU keeps no copy, and reads what is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__(lambda t: t.to("cpu", copy=True), lambda t: t)


def randomise(model: nn.Module) -> nn.Module:
    """Move every parameter away from where it starts: biases at 0 and gains at 1 hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def weighted_sum(y: Tensor) -> Tensor:
    """A loss with another gradient for every element: of a sum, the gradient through a norm is zero."""
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum()


class Doubled(torch.autograd.Function):
    """Twice a tensor, by an autograd function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class _SquareLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.square().sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y


def function_loss(y: Tensor) -> Tensor:
    """Half of the sum of squares, by an autograd function."""
    return _SquareLoss.apply(y)


@torch.jit.script
def scripted_loss(y: Tensor) -> Tensor:
    """A loss compiled by TorchScript."""
    return (y * y).mean() + y.sum().tanh()


def targets_of(y: Tensor) -> Tensor:
    """Class numbers for logits whose last dimension is classes."""
    return torch.arange(y[..., 0].numel()).remainder(y.shape[-1]).view(y.shape[:-1])


def class_loss(y: Tensor, **options: Any) -> Tensor:
    """Cross entropy over the last dimension."""
    return F.cross_entropy(y.reshape(-1, y.shape[-1]), targets_of(y).reshape(-1), **options)
