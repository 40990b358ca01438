"""Tiny models of many architectures, each with a batch that gives a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

Batch = dict[str, Any]
VOCABULARY, BATCH, LENGTH = 64, 3, 12

_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}


def _tokens() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (BATCH, LENGTH))


def _padding() -> torch.Tensor:
    lengths = torch.tensor([LENGTH, LENGTH - 5, LENGTH - 2])
    return (torch.arange(LENGTH) < lengths[:, None]).long()


def _classified_text(model: PreTrainedModel) -> Batch:
    return {"input_ids": _tokens(), "attention_mask": _padding(), "labels": torch.tensor([0, 1, 1])}


def _language(model: PreTrainedModel) -> Batch:
    tokens = _tokens()
    return {"input_ids": tokens, "attention_mask": _padding(), "labels": tokens}


def _unpadded(model: PreTrainedModel) -> Batch:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens}


def _classified_images(model: PreTrainedModel) -> Batch:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.tensor([0, 1, 1])}


def _classified_maps(model: PreTrainedModel) -> Batch:
    """An odd size, so that strides leave something over."""
    return {"pixel_values": torch.randn(BATCH, 3, 67, 61), "labels": torch.tensor([0, 1, 1])}


def _segmented_images(model: PreTrainedModel) -> Batch:
    return {"pixel_values": torch.randn(BATCH, 3, 64, 64), "labels": torch.randint(0, 4, (BATCH, 64, 64))}


def _detected_objects(model: PreTrainedModel) -> Batch:
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.3]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.4, 0.5, 0.3]])},
    ]
    return {"pixel_values": torch.randn(2, 3, 64, 64), "labels": labels}


def _sequence_to_sequence(model: PreTrainedModel) -> Batch:
    return {"input_ids": _tokens(), "attention_mask": _padding(), "labels": _tokens()}


def _image_and_text(model: PreTrainedModel) -> Batch:
    return {
        "pixel_values": torch.randn(BATCH, 3, 32, 32),
        "input_ids": _tokens(),
        "attention_mask": _padding(),
        "return_loss": True,
    }


def _speech(model: PreTrainedModel) -> Batch:
    return {"input_features": torch.randn(BATCH, 16, 40), "labels": _tokens()}


_Make = tuple[type[PreTrainedModel], Callable[[], Any], Callable[[PreTrainedModel], Batch]]

ARCHITECTURES: dict[str, _Make] = {
    "vit": (hf.ViTForImageClassification, lambda: hf.ViTConfig(**_IMAGE), _classified_images),
    "bert": (
        hf.BertForSequenceClassification,
        lambda: hf.BertConfig(vocab_size=VOCABULARY, **_SIZES),
        _classified_text,
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
        ),
        _language,
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        lambda: hf.DistilBertConfig(vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=96),
        _classified_text,
    ),
    "roberta": (
        hf.RobertaForMaskedLM,
        lambda: hf.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=40, **_SIZES),
        _language,
    ),
    "albert": (
        hf.AlbertForSequenceClassification,
        lambda: hf.AlbertConfig(vocab_size=VOCABULARY, embedding_size=24, hidden_dropout_prob=0.1, **_SIZES),
        _classified_text,
    ),
    "electra": (
        hf.ElectraForSequenceClassification,
        lambda: hf.ElectraConfig(vocab_size=VOCABULARY, embedding_size=24, **_SIZES),
        _classified_text,
    ),
    "deit": (hf.DeiTForImageClassification, lambda: hf.DeiTConfig(**_IMAGE), _classified_images),
    "dinov2": (
        hf.Dinov2ForImageClassification,
        lambda: hf.Dinov2Config(
            image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        _classified_images,
    ),
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(vocab_size=VOCABULARY, **_DECODER), _language),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(vocab_size=VOCABULARY, **_DECODER), _language),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(vocab_size=VOCABULARY, head_dim=12, **_DECODER), _unpadded),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(vocab_size=VOCABULARY, **_DECODER), _unpadded),
    "gemma": (hf.GemmaForCausalLM, lambda: hf.GemmaConfig(vocab_size=VOCABULARY, head_dim=12, **_DECODER), _language),
    "gpt_neox": (
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(
            vocab_size=VOCABULARY, max_position_embeddings=32, hidden_dropout=0.1, attention_dropout=0.1, **_SIZES
        ),
        _language,
    ),
    "opt": (
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            word_embed_proj_dim=48,
            max_position_embeddings=32,
        ),
        _language,
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        _sequence_to_sequence,
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_position_embeddings=32,
        ),
        _sequence_to_sequence,
    ),
    "clip": (
        hf.CLIPModel,
        lambda: hf.CLIPConfig(
            text_config={**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 1},
            vision_config=_IMAGE,
            projection_dim=32,
        ),
        _image_and_text,
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=16,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=20,
            max_target_positions=32,
            dropout=0.1,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        _speech,
    ),
}


_CONVOLUTIONAL = {
    "resnet": (
        hf.ResNetForImageClassification,
        lambda: hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2]),
        _classified_maps,
    ),
    "mobilenet_v2": (
        hf.MobileNetV2ForImageClassification,
        lambda: hf.MobileNetV2Config(depth_multiplier=0.35, classifier_dropout_prob=0.1),
        _classified_maps,
    ),
    "efficientnet": (
        hf.EfficientNetForImageClassification,
        lambda: hf.EfficientNetConfig(
            width_coefficient=0.5,
            depth_coefficient=0.3,
            image_size=64,
            hidden_dim=640,
            drop_connect_rate=0.0,
        ),
        _classified_maps,
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        lambda: hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]),
        _classified_maps,
    ),
    "segformer": (
        hf.SegformerForSemanticSegmentation,
        lambda: hf.SegformerConfig(
            **{"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]},
            **{"decoder_hidden_size": 48, "num_labels": 4},
        ),
        _segmented_images,
    ),
    "convnextv2": (
        hf.ConvNextV2ForImageClassification,
        lambda: hf.ConvNextV2Config(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]),
        _classified_maps,
    ),
    "regnet": (
        hf.RegNetForImageClassification,
        lambda: hf.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], groups_width=8),
        _classified_maps,
    ),
    "bit": (
        hf.BitForImageClassification,
        lambda: hf.BitConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1], num_groups=4),
        _classified_maps,
    ),
    "poolformer": (
        hf.PoolFormerForImageClassification,
        lambda: hf.PoolFormerConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
        _classified_maps,
    ),
    "mobilevit": (
        hf.MobileViTForImageClassification,
        lambda: hf.MobileViTConfig(
            hidden_sizes=[24, 32, 40],
            neck_hidden_sizes=[8, 16, 16, 24, 32, 40, 64],
            image_size=64,
            aspp_out_channels=32,
        ),
        lambda model: {"pixel_values": torch.randn(BATCH, 3, 64, 64), "labels": torch.tensor([0, 1, 1])},
    ),
    "mobilenet_v2_segmentation": (
        hf.MobileNetV2ForSemanticSegmentation,
        lambda: hf.MobileNetV2Config(depth_multiplier=0.35, output_stride=8, num_labels=4),
        _segmented_images,
    ),
    "upernet": (
        hf.UperNetForSemanticSegmentation,
        lambda: hf.UperNetConfig(
            backbone_config=hf.ResNetConfig(
                embedding_size=16,
                hidden_sizes=[16, 24, 32, 48],
                depths=[1, 1, 1, 1],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            hidden_size=32,
            auxiliary_channels=16,
            auxiliary_in_channels=32,
            num_labels=4,
        ),
        _segmented_images,
    ),
    "dpt": (
        hf.DPTForSemanticSegmentation,
        lambda: hf.DPTConfig(
            **{**_IMAGE, "num_hidden_layers": 4, "image_size": 64},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 24, 32, 48],
            fusion_hidden_size=24,
            num_labels=4,
        ),
        _segmented_images,
    ),
    "beit": (
        hf.BeitForSemanticSegmentation,
        lambda: hf.BeitConfig(
            **{**_IMAGE, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
            out_indices=[1, 2, 3, 4],
            num_labels=4,
        ),
        _segmented_images,
    ),
    "data2vec": (
        hf.Data2VecVisionForSemanticSegmentation,
        lambda: hf.Data2VecVisionConfig(
            **{**_IMAGE, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
            out_indices=[0, 1, 2, 3],
            num_labels=4,
        ),
        _segmented_images,
    ),
    "detr": (
        hf.DetrForObjectDetection,
        lambda: hf.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=hf.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=["stage4"]
            ),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=6,
            num_labels=4,
        ),
        _detected_objects,
    ),
}
ARCHITECTURES |= _CONVOLUTIONAL


# Models most of which is computed again, as no operator takes it.
RECOMPUTED: dict[str, Any] = {
    "falcon": (
        hf.FalconForCausalLM,
        lambda: hf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False
        ),
        _language,
    ),
    "mamba": (
        hf.MambaForCausalLM,
        lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, use_cache=False),
        _unpadded,
    ),
    "mixtral": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            use_cache=False,
        ),
        _language,
    ),
}


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Switch activation checkpointing on, by the name that this Transformers has for that."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def make(name: str, attention: str = "sdpa") -> tuple[PreTrainedModel, Batch]:
    """A freshly initialised model in training mode, and a batch for it."""
    model_class, config, batch = (ARCHITECTURES | RECOMPUTED)[name]
    implementation = attention if model_class._supports_sdpa else "eager"
    settings = config()
    if getattr(settings, "backbone_config", None) is not None:  # convolutional ones know no attention
        implementation = {"": implementation, "backbone_config": "eager"}
    model = model_class._from_config(settings, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # biases and class tokens as they are after some training, not at zero
                parameter.normal_(std=0.1)
    return model.train(), batch(model)
