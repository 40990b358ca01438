"""LayerNorm and the RMSNorms of Transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import RazorConfig
from ..functional import layer_norm, rms_norm
from .base import RazorModule, describe, norm_spec, whole_shape


class RazorLayerNorm(RazorModule):
    """`nn.LayerNorm`, and subclasses that leave its forward alone."""

    kind = "norm"

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return type(module).forward is nn.LayerNorm.forward

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `x` packed."""
        if not self.razor_active(x, self.weight) or not self.worth_packing(x):
            return super().forward(x)
        config = self.razor_config
        return layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, norm_spec(config), stores=config.norm
        )

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"{describe(norm_spec(self.razor_config))} of {self.razor_config.norm}"


class RazorRMSNorm(RazorModule):
    """`nn.RMSNorm` and the RMSNorms that Transformers defines in each architecture's own file.

    They are known by what they compute: a module whose name ends in "Norm", with one vector for its weight, is tried
    on random numbers against the definition of RMSNorm.
    """

    kind = "norm"
    razor_offset: float
    razor_epsilon: float | None

    @classmethod
    def handles(cls, module: nn.Module) -> bool:
        """See `RazorModule.handles`."""
        return _looks_like_norm(module) and _probe(module) is not None

    @classmethod
    def cannot_handle(cls, module: nn.Module) -> str | None:
        """See `RazorModule.cannot_handle`."""
        if type(module).__name__.endswith("Norm") and not RazorLayerNorm.handles(module) and not cls.handles(module):
            return f"{type(module).__name__} is neither LayerNorm nor RMSNorm with one weight vector"
        return None

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        offset, epsilon = _probe(module)
        super().install(module, config)
        module.razor_offset, module.razor_epsilon = offset, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `x` packed."""
        if not self.razor_active(x, self.weight) or not self.worth_packing(x):
            return super().forward(x)
        config = self.razor_config
        return rms_norm(
            x,
            self.weight,
            self.razor_epsilon,
            norm_spec(config),
            stores=config.norm,
            offset=self.razor_offset,
            forward=super().forward,
        )

    razor_repr = RazorLayerNorm.razor_repr


def _looks_like_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return (
        type(module).__name__.endswith("Norm")
        and not any(True for _ in module.children())
        and list(parameters) == ["weight"]
        and len(whole_shape(parameters["weight"])) == 1
    )


def _probe(module: nn.Module) -> tuple[float, float | None] | None:
    """The weight offset and the epsilon with which `module` is an RMSNorm, or None if it is none.

    The weight is replaced for the call, so this works on meta and sharded parameters too.
    """
    names = ("variance_epsilon", "eps", "epsilon")
    epsilon = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    known = torch.finfo(torch.float32).eps if epsilon is None else float(epsilon)
    # Explicitly on the CPU and in float32, whatever the defaults are just now.
    with torch.no_grad(), torch.device("cpu"):
        generator, shape = torch.Generator("cpu").manual_seed(0), whole_shape(module.weight)
        weight = torch.rand(shape, generator=generator, dtype=torch.float32)
        # Small, so that epsilon shows.
        x = torch.randn(2, *shape, generator=generator, dtype=torch.float32) * known**0.5
        x_hat = x * (x.square().mean(-1, keepdim=True) + known).rsqrt()
        try:
            y = functional_call(module, {"weight": weight}, (x,))
        except Exception:  # a forward of another kind; whatever it raises, it is not this operator
            return None
        for offset in (0.0, 1.0):
            if isinstance(y, Tensor) and torch.allclose(y, x_hat * (weight + offset), rtol=1e-4, atol=1e-5):
                return offset, epsilon
    return None
