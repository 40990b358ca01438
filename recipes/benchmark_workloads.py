"""What the benchmarks train: ViT-B/16, BERT-base, GPT-2, SmolLM2, ResNet-50, MobileNetV2 and SegFormer-B0.

They have random weights, their default dropout, labels and loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from hf_backrazor import RazorConfig, get_razor_model

Batch = dict[str, Any]

# Names of the blocks of ResNet and MobileNetV2.
BLOCKS_OF_MAPS = r"[a-z_0-9]+\.(encoder\.stages\.\d+\.layers|layer)\.\d+"

# PEFT's default targets for BERT and GPT-2; for ViT it has none, and attention's q and v are what its examples take.
LORA_TARGETS = {"vit": ["q_proj", "v_proj"], "bert": None, "gpt2": None}


def vit() -> tuple[PreTrainedModel, Batch]:
    model = ViTForImageClassification(ViTConfig(num_labels=10))
    return model, {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.arange(8)}


def bert() -> tuple[PreTrainedModel, Batch]:
    tokens = torch.randint(1000, 30000, (8, 128))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(8) % 2}
    return BertForSequenceClassification(BertConfig()), batch


def gpt2(batch: int, length: int) -> tuple[PreTrainedModel, Batch]:
    tokens = torch.randint(0, 50000, (batch, length))
    return GPT2LMHeadModel(GPT2Config(use_cache=False)), {"input_ids": tokens, "labels": tokens}


def llama() -> tuple[PreTrainedModel, Batch]:
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    tokens = torch.randint(0, 32000, (2, 512))
    return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)), {"input_ids": tokens, "labels": tokens}


def smollm2() -> tuple[PreTrainedModel, Batch]:
    """SmolLM2-135M: thirty narrow layers."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    tokens = torch.randint(0, 49152, (4, 512))
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))
    return model, {"input_ids": tokens, "labels": tokens}


def resnet() -> tuple[PreTrainedModel, Batch]:
    model = ResNetForImageClassification(ResNetConfig(num_labels=10))
    return model, {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.arange(8)}


def mobilenet() -> tuple[PreTrainedModel, Batch]:
    model = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10))
    return model, {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.arange(8)}


def segformer() -> tuple[PreTrainedModel, Batch]:
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
    return model, {"pixel_values": torch.randn(2, 3, 512, 512), "labels": torch.randint(0, 150, (2, 512, 512))}


WORKLOADS: dict[str, Callable[[], tuple[PreTrainedModel, Batch]]] = {
    "ViT-B/16 8x224x224": vit,
    "BERT-base 8x128": bert,
    "GPT-2 2x512": lambda: gpt2(2, 512),
    "GPT-2 1x1024": lambda: gpt2(1, 1024),
    "SmolLM2-135M 4x512": smollm2,
    "ResNet-50 8x224x224": resnet,
    "MobileNetV2 8x224x224": mobilenet,
    "SegFormer-B0 2x512x512": segformer,
}


def with_lora(model: PreTrainedModel) -> PeftModel:
    """LoRA of rank 8."""
    return get_peft_model(model, LoraConfig(r=8, target_modules=LORA_TARGETS[model.config.model_type]))


def with_checkpointing(model: PreTrainedModel) -> PreTrainedModel:
    """Activation checkpointing of each block, also where Transformers does not offer it (ResNet, MobileNetV2)."""
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
        return model
    for name, block in model.named_modules():
        if re.fullmatch(BLOCKS_OF_MAPS, name):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def with_packed_checkpoints(model: PreTrainedModel) -> PreTrainedModel:
    """The preset `compact`, with the same blocks."""
    blocks = None if model.supports_gradient_checkpointing else BLOCKS_OF_MAPS
    return get_razor_model(model, RazorConfig.preset("compact", recompute_modules=blocks))


def with_fixed_batch_norms(model: PreTrainedModel) -> PreTrainedModel:
    """As the paper trained convolutional networks: batch norms use fixed statistics and weights."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model
