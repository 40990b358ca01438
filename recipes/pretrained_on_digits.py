"""What stands in for a pretrained ViT where none is named: a small one that has learned half of the digits."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, ViTForImageClassification, default_data_collator
from transformers.optimization import get_linear_schedule_with_warmup

from image_pixels import PlainImageProcessor
from offline_data import handwritten_digits, small_vit_config

KNOWN, NEW = range(5), range(5, 10)
IMAGE_SIZE, PATCH_SIZE, CHANNELS = 8, 2, 1
BATCH_SIZE, LEARNING_RATE = 32, 1e-3


def vit_that_knows_half(epochs: int, device: torch.device, **labels: object) -> ViTForImageClassification:
    """A ViT trained densely on the digits 0 to 4, with an untrained classifier for the digits to come.

    Args:
        epochs: how often it sees them.
        device: where it is trained; it comes back there.
        labels: `num_labels`, `id2label`, `label2id` of the new classifier.
    """
    rows = handwritten_digits(KNOWN)["train"]
    processor = PlainImageProcessor(IMAGE_SIZE, CHANNELS)
    images = processor(rows["image"])["pixel_values"]
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(images, rows["label"], strict=True)]
    loader = DataLoader(examples, batch_size=BATCH_SIZE, shuffle=True, collate_fn=default_data_collator)

    settings = small_vit_config(IMAGE_SIZE, PATCH_SIZE, CHANNELS, num_labels=len(KNOWN))
    model = AutoModelForImageClassification.from_config(settings).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(epochs):
        for batch in loader:
            model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    adapted = small_vit_config(IMAGE_SIZE, PATCH_SIZE, CHANNELS, **labels)
    fresh = AutoModelForImageClassification.from_config(adapted).to(device)
    fresh.base_model.load_state_dict(model.base_model.state_dict())
    return fresh
