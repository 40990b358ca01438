"""Numbers and tables as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others to the right. The first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


def mebibytes(size: int) -> str:
    """A number of bytes in MiB, with thousands apart."""
    return f"{size / 2**20:,.1f}" if size < 10 * 2**20 else f"{size / 2**20:,.0f}"


def parse_bytes(text: str) -> int:
    """What `8GiB`, `500 MB` or `1e9` say.

    Raises:
        ValueError: it says nothing of the kind, or not more than zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in _UNITS or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise ValueError(f"{text!r} is not an amount of memory: expected one such as 8GiB or 500MB")
    return size
