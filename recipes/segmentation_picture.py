"""`--pictures`: images, their annotations and what the model makes of them, as `predictions.png` in the run folder."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch

from class_maps import IGNORED

PICTURE = "predictions.png"
SIDE, LINE, LETTER, DPI = 1.5, 0.22, 0.09, 120  # inches: of an image, of a line of text, of a letter; pixels an inch
TITLES = "image", "annotation", "prediction"
# Class 0, which often is background, stays dark; what counts for nothing is white.
FIRST_COLOUR, IGNORED_COLOUR = (0.2, 0.2, 0.2), (1.0, 1.0, 1.0)


def class_colour(number: int) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1 for a class: ten hues in turn, light ones between dark ones."""
    if number in (0, IGNORED):
        return FIRST_COLOUR if number == 0 else IGNORED_COLOUR
    hue = number * 3 % 10
    saturation, value = ((0.55, 1.0), (0.9, 0.75))[hue % 2]
    # From the eleventh class on between the hues that were.
    return colorsys.hsv_to_rgb((hue / 10 + (number - 1) // 10 * 0.03) % 1, saturation, value)


def save_predictions(
    folder: str, *, images: torch.Tensor, maps: list[tuple[torch.Tensor, torch.Tensor]], names: list[str], title: str
) -> None:
    """Draw a row for each image: itself, its annotation, its prediction; and write them to `predictions.png`.

    Args:
        folder: where to write.
        images: from 0 to 1, image by channel by height by width.
        maps: for each image what was predicted and what is right, class numbers of height by width.
        names: of the classes.
        title: above all.
    """
    # Here and not above: only this needs matplotlib. Not pyplot, which keeps figures and picks a window system.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = np.array([class_colour(number) for number in range(IGNORED + 1)])
    present = sorted({int(number) for both in maps for one in both for number in one.unique()})
    entries = {number: "not counted" if number == IGNORED else names[number] for number in present}
    width = len(TITLES) * SIDE + LETTER * (8 + max(len(entry) for entry in entries.values()))
    height = 2 * LINE + max(len(maps) * SIDE, len(entries) * LINE)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    panels = figure.subplots(len(maps), len(TITLES), squeeze=False)
    for row, image, (predicted, true) in zip(panels, images, maps, strict=True):
        shown = image.permute(1, 2, 0).expand(-1, -1, 3), colours[true], colours[predicted]
        for panel, pixels in zip(row, shown, strict=True):
            panel.imshow(pixels, interpolation="nearest")
            panel.set_axis_off()
    for panel, column in zip(panels[0], TITLES, strict=True):
        panel.set_title(column, fontsize=10)

    keys = [Patch(facecolor=colours[number], edgecolor="0.6", label=entry) for number, entry in entries.items()]
    legend = figure.legend(handles=keys, loc="outside right center", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(Path(folder) / PICTURE)
