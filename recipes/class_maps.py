"""Maps of classes: a number for each pixel of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# The number of pixels that count for nothing, in annotations and in Transformers' image processors.
IGNORED = 255


def class_map(annotation: Any) -> np.ndarray:
    """Class numbers as bytes, height by width, from a PIL image (of grey levels or with a palette) or an array."""
    # As a byte, -1 is 255; it stands for no class where the numbers are `datasets.ClassLabel`s.
    return np.array(annotation).squeeze().astype(np.uint8)


def count_pixels(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Count the pixels of each pair of a predicted and a true class, as `metrics/mean_iou` takes them.

    Args:
        predictions: class numbers, of any shape.
        labels: what is right, of the same shape; `IGNORED` where nothing is.

    Returns:
        `predictions` and `references`, one number for each pair that occurs, and `pixels`, how often it does.
    """
    pairs, pixels = ((IGNORED + 1) * labels + predictions).unique(return_counts=True)
    return {"predictions": pairs % (IGNORED + 1), "references": pairs // (IGNORED + 1), "pixels": pixels}
