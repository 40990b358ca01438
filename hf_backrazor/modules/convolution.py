"""Convolutions."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
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
        batched = input.dim() == len(self.kernel_size) + 2
        if not batched or not self.packs(input, parameters=("weight",)):
            return super().forward(input, *(() if output_size is None else (output_size,)))
        spatial = input.dim() - 2
        weight, bias, spec = self.weight, self.bias, input_spec(self.razor_config, spatial)
        if self.padding == "same":
            return convolution_same(input, weight, bias, self.stride, self.dilation, self.groups, spec)
        moves = (self.stride, self.padding, self.dilation, self.groups)
        if not self.transposed:
            plain = partial(self._conv_forward, weight=weight, bias=bias)
            return convolution(input, weight, bias, Geometry.of(weight, *moves), plain, spec)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]

        def forward(x: Tensor) -> Tensor:
            return transpose(x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)

        return convolution(input, weight, bias, Geometry.of(weight, *moves, output_padding), forward, spec)

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return describe(input_spec(self.razor_config))
