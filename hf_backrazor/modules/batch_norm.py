"""Batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import batch_norm
from .base import RazorModule, describe, map_norm_spec


class RazorBatchNorm(RazorModule):
    """`nn.BatchNorm1d` to `nn.BatchNorm3d`, and subclasses that leave their forward alone."""

    kind = "norm"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return isinstance(module, types) and type(module).forward is nn.BatchNorm2d.forward

    def razor_active(self, *tensors: Tensor | None) -> bool:
        """In eval mode too, if there are gradients: that is how statistics are kept fixed while the rest trains."""
        return (
            self.razor_enabled and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        )

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `x` packed, or nothing if statistics and weight are fixed."""
        if x.dim() < 3 or not self.razor_active(x, self.weight, self.bias) or not self.worth_packing(x):
            return super().forward(x)
        self._check_input_dim(x)
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative mean
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        update = not self.training or self.track_running_stats
        config = self.razor_config
        return batch_norm(
            x,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
            map_norm_spec(config, x.dim() - 2),
            stores=config.norm,
        )

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"{describe(map_norm_spec(self.razor_config, 2))} of {self.razor_config.norm}"
