"""Handwritten digits on photographs, annotated pixel by pixel: a small task of segmentation that needs no download.

scikit-learn brings both: scans of digits (8 x 8 grey pixels) and two photographs. A photograph lends a random crop,
digits are laid onto it in colours that stand out, and the annotation says which pixels belong to which digit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image
from PIL import Image as PillowImage
from sklearn.datasets import load_sample_images

from class_maps import IGNORED
from offline_data import handwritten_digits

CLASS_NAMES = ["background", *(f"digit {digit}" for digit in range(10))]
SIZE = 48  # pixels, of an image's sides
# Left of this share of a photograph's width is for training, right of it for testing.
TRAINING_SHARE = 0.7
CROPS = 48, 144  # pixels, of the sides of what becomes the background
DIGITS = 2, 5  # on an image
SIDES = 16, 26  # pixels, of the square that a digit's 8 x 8 are stretched to
# A stroke ends where it covers half of what is behind it; what it covers less, to a quarter, is its blurred edge.
COVERED, EDGE = 0.5, 0.25
CONTRAST = 150  # of 441: how far a digit's colour is at least from the mean of what it covers
ATTEMPTS = 20


def digits_on_photographs(train_images: int = 3200, test_images: int = 240, seed: int = 0) -> DatasetDict:
    """Build the task: columns `image` (RGB, 48 x 48) and `annotation` (class numbers, 48 x 48).

    The same seed gives the same images. Training and test images share no scan and no region of a photograph.
    """
    digits, photographs = handwritten_digits(), load_sample_images().images
    border = round(TRAINING_SHARE * photographs[0].shape[1])
    regions = {
        "train": [photograph[:, :border] for photograph in photographs],
        "test": [photograph[:, border:] for photograph in photographs],
    }
    splits = DatasetDict()
    for number, (split, images) in enumerate((("train", train_images), ("test", test_images))):
        scans = np.array(digits[split]["image"], dtype=np.uint8)
        classes = 1 + np.array(digits[split]["label"])
        draw = np.random.default_rng((seed, number))
        rows = []
        for _ in range(images):
            image = _crop(regions[split][draw.integers(len(photographs))], draw)
            annotation = np.zeros((SIZE, SIZE), np.uint8)
            for left, top, side in _places(draw):
                scan = draw.integers(len(scans))
                square = np.s_[top : top + side, left : left + side]
                image[square], annotation[square] = lay_on(image[square], scans[scan], classes[scan], draw)
            rows.append({"image": image, "annotation": annotation})
        splits[split] = Dataset.from_list(rows, features=Features({"image": Image(), "annotation": Image()}))
    return splits


def lay_on(
    background: np.ndarray, scan: np.ndarray, number: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A digit in some colour on a square of background, and its annotation.

    Args:
        background: RGB bytes, side by side by 3.
        scan: grey bytes, 8 by 8; bright where the pen was.
        number: the digit's class.
        draw: where the colour comes from.

    Returns:
        The square with the digit on it, of the background's shape, and class numbers, side by side.
    """
    side = len(background)
    coverage = np.asarray(PillowImage.fromarray(scan).resize((side, side), PillowImage.Resampling.BICUBIC)) / 255
    behind = np.average(background, axis=(0, 1), weights=coverage + 1e-6)
    colour = draw.integers(256, size=3)
    while np.linalg.norm(colour - behind) < CONTRAST:
        colour = draw.integers(256, size=3)
    mixed = background + coverage[..., None] * (colour - background)
    annotation = np.select([coverage >= COVERED, coverage >= EDGE], [number, IGNORED], 0)
    return np.rint(mixed).astype(np.uint8), annotation.astype(np.uint8)


def _crop(region: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    side = draw.integers(CROPS[0], CROPS[1] + 1)
    top, left = (draw.integers(length - side + 1) for length in region.shape[:2])
    # Cut before it is scaled: Pillow's filters look at pixels around a box that is scaled in place.
    square = PillowImage.fromarray(region[top : top + side, left : left + side])
    return np.array(square.resize((SIZE, SIZE), PillowImage.Resampling.BILINEAR))


def _places(draw: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """Left, top and side of squares that do not overlap; a digit that finds no place is left out."""
    taken = np.zeros((SIZE, SIZE), bool)
    for _ in range(draw.integers(DIGITS[0], DIGITS[1] + 1)):
        for _ in range(ATTEMPTS):
            side = draw.integers(SIDES[0], SIDES[1] + 1)
            left, top = draw.integers(SIZE - side + 1, size=2)
            square = np.s_[top : top + side, left : left + side]
            if not taken[square].any():
                taken[square] = True
                yield left, top, side
                break
