"""The model and the batch that a command is about."""

from __future__ import annotations

import argparse
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, in which dtype, and how long its inputs are."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hub id, folder, or a model type (bert, vit, gpt2, ...) for its default configuration",
    )
    parser.add_argument(
        "--task", choices=TASKS, help="default: what the model's configuration says, or suits its input"
    )
    parser.add_argument("--sequence", type=positive, help="tokens of a text (default: 128, or what the model takes)")
    parser.add_argument("--image", type=positive, help="height and width of an image (default: the model's)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--token", help="access token, for a model that is not public")
    parser.add_argument("--revision", help="branch, tag or commit of the model")


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


class Subject:
    """A model without memory for its weights, and the shape of its inputs.

    Attributes:
        name: as it was given.
        class_name: of the model.
        inputs: what one example is, in words.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        self.name = arguments.model
        if "/" not in self.name and self.name in CONFIG_MAPPING:
            self._config = AutoConfig.for_model(self.name)
        else:
            self._config = AutoConfig.from_pretrained(self.name, revision=arguments.revision, token=arguments.token)
        if arguments.image and hasattr(self._config, "image_size"):
            self._config.image_size = arguments.image
        self._dtype = arguments.dtype
        self._task = arguments.task
        model = self.build()
        self.class_name = type(model).__name__
        self._example, self.inputs = _example(model, arguments)

    def build(self) -> Any:
        """The model, on the meta device, in training mode."""
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = self._config.__class__.from_dict(self._config.to_dict())
            model = _class_of(config, self._task)(config)
        model = model.to(getattr(torch, self._dtype)).train()
        model.config.use_cache = False
        return model

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs for so many examples."""
        return {name: (batch, *shape) for name, shape in self._example.items()}


def _class_of(config: Any, task: str | None) -> Callable[[Any], Any]:
    import transformers

    from ..auto import model_class

    if task is not None:
        return getattr(transformers, TASKS[task]).from_config
    if config.architectures:
        return model_class(config.architectures, config.model_type)
    mapping = transformers.models.auto.modeling_auto
    for names in (
        mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not _reads_both_ways(config) else {},
        mapping.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        mapping.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        mapping.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ):
        if config.model_type in names:
            found = names[config.model_type]
            return model_class([found[0] if isinstance(found, tuple) else found], config.model_type)
    raise ValueError(f"no task is known for models of type {config.model_type!r}: choose one with --task")


def _reads_both_ways(config: Any) -> bool:
    """Whether a type that has a causal head is trained in other ways first of all, as BERT is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    return config.model_type in masked or getattr(config, "is_encoder_decoder", False)


def _example(model: Any, arguments: argparse.Namespace) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes of one example's inputs, and what they are in words."""
    config = model.config
    if model.main_input_name == "pixel_values":
        side = arguments.image or getattr(config, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else side
        return {"pixel_values": (getattr(config, "num_channels", 3), height, width)}, f"images of {height}x{width}"
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, and this command knows texts and images only; use "
            "hf_backrazor.estimate_saved_bytes"
        )
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    length = arguments.sequence or int(min(128, longest))
    if length > longest:
        raise ValueError(f"--sequence {length} is more than the {longest} tokens that {type(model).__name__} takes")
    shapes: dict[str, tuple[int, ...]] = {"input_ids": (length,)}
    if "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        shapes["decoder_input_ids"] = (length,)
    return shapes, f"{length} tokens"
