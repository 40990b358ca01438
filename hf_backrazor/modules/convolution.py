"""Convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import Geometry, convolution, convolution_same
from .base import RazorModule, describe, input_spec

_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class RazorConvolution(RazorModule):
    """`nn.Conv1d` to `nn.ConvTranspose3d`, and subclasses that leave their forward alone."""

    kind = "convolution"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        plain = next((kind for kind in _TYPES if isinstance(module, kind)), None)
        return plain is not None and type(module).forward is plain.forward and module.padding_mode == "zeros"

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        if not isinstance(module, _TYPES) or cls.handles(module):
            return None
        return f"{type(module).__name__} has a forward of its own"

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the plain module; saves `input` packed where the weight is being trained, and else nothing of it."""
        arguments = () if output_size is None else (output_size,)
        batched = input.dim() == self.weight.dim()
        if not batched or not self.razor_active(input, self.weight) or not self.worth_packing(input):
            return super().forward(input, *arguments)
        spatial = input.dim() - 2
        output_padding = None
        if self.transposed:
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
            )
        spec = input_spec(self.razor_config, spatial)
        if self.padding == "same":
            return convolution_same(input, self.weight, self.bias, self.stride, self.dilation, self.groups, spec)
        geometry = Geometry.of(self.weight, self.stride, self.padding, self.dilation, self.groups, output_padding)
        plain = super().forward
        return convolution(input, self.weight, self.bias, geometry, lambda x: plain(x, *arguments), spec)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return describe(input_spec(self.razor_config))
