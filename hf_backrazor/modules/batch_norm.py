"""Batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..config import RazorConfig
from ..functional import batch_norm
from ..packing import PackSpec
from .base import RazorModule, describe, is_pooled, map_norm_spec


class RazorBatchNorm(RazorModule):
    """`nn.BatchNorm1d` to `nn.BatchNorm3d`, and subclasses that leave their forward alone."""

    kind = "norm"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return isinstance(module, types) and type(module).forward is nn.BatchNorm2d.forward

    def razor_active(self, *tensors: Tensor | None, parameters: Sequence[str] = ()) -> bool:
        """In eval mode too, if there are gradients: that is how statistics are kept fixed while the rest trains."""
        return self._saves_for(tensors, parameters)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `input` packed, or nothing if statistics and weight are fixed."""
        if not has_statistics(input) or not self.packs(input, parameters=("weight", "bias")):
            return super().forward(input)
        self._check_input_dim(input)
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative mean
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        update = not self.training or self.track_running_stats
        config = self.razor_config
        return batch_norm(
            input,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
            batch_norm_spec(config, input),
            stores=config.norm,
        )

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"{describe(map_norm_spec(self.razor_config, 2))} of {self.razor_config.norm}"


def has_statistics(x: Tensor) -> bool:
    """Whether `x` has channels, and more than one value in each; of one torch refuses to take statistics."""
    return x.dim() > 1 and x.numel() != x.shape[1]


def batch_norm_spec(config: RazorConfig, x: Tensor) -> PackSpec:
    """How a batch norm of `x` packs what it stores."""
    # Of a few samples, what is left of the gradient is a small difference.
    return PackSpec() if is_pooled(x) else map_norm_spec(config, max(1, x.dim() - 2))
