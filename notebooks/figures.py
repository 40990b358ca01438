"""Figures of the notebooks: as PNGs of few colours, a third of the bytes, since outputs are kept in git."""

from __future__ import annotations

from io import BytesIO

import matplotlib.pyplot as plt
import PIL.Image
from IPython.display import Image, display
from matplotlib.figure import Figure

COLOURS = 128


def show(figure: Figure) -> None:
    """Display a figure as the output of the cell, and close it."""
    drawn, stored = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    palette = PIL.Image.open(drawn).convert("RGB").quantize(COLOURS, dither=PIL.Image.Dither.NONE)
    palette.save(stored, format="png", optimize=True)
    plt.close(figure)
    display(Image(data=stored.getvalue()))
