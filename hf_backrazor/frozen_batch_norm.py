"""Batch norms whose statistics and weights stay as they are, while the rest of the model trains."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .compat import AnyBatchNorm
from .extension import Extension, extend

Model = TypeVar("Model", bound=nn.Module)


class FrozenBatchNorm(Extension):
    """A batch norm that stays in eval mode, whatever `train()` is called on: Trainer calls it before each step."""

    name_prefix = "Frozen"

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """As the plain module's, but the mode stays that of evaluation."""
        return super().train(False)


def freeze_batch_norms(model: Model) -> Model:
    """Fix the statistics and freeze the weights of every batch norm, for training on few images, or as the paper did.

    Nothing is then saved for their gradients. The same object is returned, with the same parameters and state-dict
    keys. Call it before `get_razor_model` and before an optimizer is made.

    Args:
        model: any model with batch norms that have running statistics.

    Raises:
        ValueError: it has none.
    """
    norms = [module for module in model.modules() if isinstance(module, AnyBatchNorm) and module.track_running_stats]
    if not norms:
        raise ValueError(f"nothing to freeze in this {type(model).__name__}: it has no batch norm with statistics")
    for module in norms:
        if not isinstance(module, FrozenBatchNorm):
            extend(module, FrozenBatchNorm)
        module.eval().requires_grad_(False)
    return model
