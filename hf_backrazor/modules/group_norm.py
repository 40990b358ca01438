"""Group and instance normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from ..compat import AnyInstanceNorm
from ..functional import batch_norm, group_norm
from .base import RazorModule, describe, map_norm_spec


class RazorGroupNorm(RazorModule):
    """`nn.GroupNorm`, and subclasses that leave its forward alone."""

    kind = "norm"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module).forward is nn.GroupNorm.forward

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `input` packed."""
        one_value = input.numel() == self.num_groups  # torch refuses to take statistics
        if input.dim() < 3 or one_value or not self.packs(input, parameters=("weight",)):
            return super().forward(input)
        config = self.razor_config
        spec = map_norm_spec(config, input.dim() - 2)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, spec, stores=config.norm)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"{describe(map_norm_spec(self.razor_config, 2))} of {self.razor_config.norm}"


class RazorInstanceNorm(RazorModule):
    """`nn.InstanceNorm1d` to `nn.InstanceNorm3d` without running statistics."""

    kind = "norm"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module).forward is nn.InstanceNorm2d.forward and not module.track_running_stats

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        if isinstance(module, AnyInstanceNorm) and not cls.handles(module):
            return f"{type(module).__name__} has running statistics, or a forward of its own"
        return None

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `input` packed."""
        batched = input.dim() == self._get_no_batch_dim() + 1
        one_value = input.numel() == input.shape[:2].numel()  # torch refuses to take statistics
        if not batched or one_value or not self.packs(input, parameters=("weight",)):
            return super().forward(input)
        self._check_input_dim(input)
        # As torch does it: a batch norm of one sample with a channel for each channel of each sample.
        samples, channels, *spatial = input.shape
        weight, bias = (None if t is None else t.repeat(samples) for t in (self.weight, self.bias))
        config = self.razor_config
        spec = map_norm_spec(config, len(spatial))
        flat = input.contiguous().view(1, samples * channels, *spatial)
        y = batch_norm(flat, None, None, weight, bias, True, 0.0, self.eps, spec, stores=config.norm)
        return y.view(input.shape)

    razor_repr = RazorGroupNorm.razor_repr
