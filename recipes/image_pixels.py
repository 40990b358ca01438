"""From images to pixel values, with or without Pillow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

BILINEAR = 2  # Pillow's number for it, which is what a saved image processor holds.


class PlainImageProcessor:
    """The image processor of the small ViT that the image recipe trains from scratch.

    Transformers' own need Pillow or torchvision, which arrays of pixels can do without. What this one saves
    is read back as a `ViTImageProcessor`, which computes the same pixel values.
    """

    def __init__(self, size: int, channels: int) -> None:
        self.size = size
        self.channels = channels

    def __call__(self, images: list[Any], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Pixel values between -1 and 1 from PIL images or arrays of bytes, height by width (by channels)."""
        return {"pixel_values": torch.stack([self._pixel_values(image) for image in images])}

    def _pixel_values(self, image: Any) -> torch.Tensor:
        if hasattr(image, "convert"):
            image = image.convert("L" if self.channels == 1 else "RGB")
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if pixels.shape[0] != self.channels:
            raise ValueError(f"an image has {pixels.shape[0]} channels where others have {self.channels}")
        if pixels.shape[1:] != (self.size, self.size):
            pixels = interpolate(pixels[None].float(), (self.size, self.size), mode="bilinear", antialias=True)[0]
            # Rounded as an image of bytes would be.
            pixels = pixels.round().clamp(0, 255)
        return pixels / 127.5 - 1

    def save_pretrained(self, folder: str) -> None:
        """Write the `preprocessor_config.json` that `AutoImageProcessor.from_pretrained` reads."""
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": BILINEAR,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * self.channels,
            "image_std": [0.5] * self.channels,
        }
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def as_pil_image(image: Any, channels: int) -> Any:
    """A PIL image or an array of bytes as a PIL image, grey if it is to have one channel."""
    # Here and not above: only models that are not trained from scratch need Pillow.
    from PIL.Image import fromarray

    if not hasattr(image, "convert"):
        image = fromarray(np.array(image, dtype=np.uint8).squeeze())
    return image.convert("L" if channels == 1 else "RGB")
