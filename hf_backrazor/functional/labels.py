"""Labels that a loss cannot count."""

from __future__ import annotations

from torch import Tensor

from ..compat import FakeTensor, assert_on_device, is_traced


def check_labels(labels: Tensor, classes: int, counted: Tensor) -> None:
    """Refuse labels out of range, as `torch.nn.functional.cross_entropy` does.

    Args:
        labels: int64, of any shape.
        classes: labels from 0 up to this are fine.
        counted: bool, as `labels`: where they matter.

    Raises:
        IndexError: on a CPU; elsewhere, and where the compiler traces this, an assertion fails: asking would wait.
    """
    if labels.is_meta or isinstance(labels, FakeTensor):
        return
    wrong = counted & ((labels < 0) | (labels >= classes))
    if labels.device.type != "cpu" or is_traced():
        assert_on_device(~wrong.any(), "Target is out of bounds.")
    elif wrong.any():
        raise IndexError(f"Target {labels[wrong][0].item()} is out of bounds.")
