"""LayerNorm and the RMSNorms of Transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

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

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module; saves x_hat or `input` packed."""
        if not self.packs(input, parameters=("weight",)):
            return super().forward(input)
        config = self.razor_config
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, norm_spec(config), stores=config.norm
        )

    def razor_repr(self) -> str:
        """See `RazorModule.razor_repr`."""
        return f"{describe(norm_spec(self.razor_config))} of {self.razor_config.norm}"


class RazorRMSNorm(RazorModule):
    """`nn.RMSNorm` and the RMSNorms that Transformers defines in each architecture's own file.

    They are known by what they compute: a module whose name ends in "Norm", with one vector for its weight or nothing
    to train, is tried on random numbers against the definition of RMSNorm.
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
        if type(module).__module__.startswith("torch.nn.utils."):  # parametrizations of a weight
            return None
        if type(module).__name__.endswith("Norm") and not RazorLayerNorm.handles(module) and not cls.handles(module):
            return f"{type(module).__name__} is neither LayerNorm nor RMSNorm with one weight vector"
        return None

    @classmethod
    def install(cls, module: nn.Module, config: RazorConfig) -> None:
        """See `RazorModule.install`."""
        found = _probe(module)
        super().install(module, config)
        assert isinstance(module, cls)
        assert found is not None
        module.razor_offset, module.razor_epsilon = found

    def forward(self, input: Tensor, *others: Any, **named: Any) -> Tensor:
        """As the plain module; saves x_hat or `input` packed. Further arguments (Mamba-2's gate) leave it dense."""
        # Its own forward reads the weight once more, which would compute a parametrized one twice.
        # An input of another width than the weight's is broadcast.
        weight = self._parameters.get("weight")
        plain = others or named or self.is_parametrized() or (weight is not None and input.shape[-1:] != weight.shape)
        if plain or not self.packs(input, weight):
            return super().forward(input, *others, **named)
        config = self.razor_config
        return rms_norm(
            input,
            weight,
            self.razor_epsilon,
            norm_spec(config),
            stores=config.norm,
            offset=self.razor_offset,
            forward=None if isinstance(self, nn.RMSNorm) else super().forward,
        )

    razor_repr = RazorLayerNorm.razor_repr


def _looks_like_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return (
        type(module).__name__.endswith("Norm")
        and not any(True for _ in module.children())
        and list(parameters) in ([], ["weight"])
        and len(_width(module)) == 1
    )


def _width(module: nn.Module) -> torch.Size:
    """Shape of the module's weight; without one, that of what it takes, or any."""
    weight = module._parameters.get("weight")
    return torch.Size(getattr(module, "normalized_shape", (16,))) if weight is None else whole_shape(weight)


def _probe(module: nn.Module) -> tuple[float, float | None] | None:
    """The weight offset and the epsilon with which `module` is an RMSNorm in training, or None if it is none.

    What runs is a stand-in that shares no tensor with the module, so this works on meta and sharded parameters too, and
    leaves buffers, counters and random state as they were.
    """
    names = ("variance_epsilon", "eps", "epsilon")
    epsilon = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    known = torch.finfo(torch.float32).eps if epsilon is None else float(epsilon)
    # Explicitly on the CPU and in float32, whatever the defaults are just now.
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        generator, shape = torch.Generator("cpu").manual_seed(0), _width(module)
        weight = torch.rand(shape, generator=generator, dtype=torch.float32)
        weight = weight if "weight" in dict(module.named_parameters(recurse=False)) else torch.ones_like(weight)
        offsets = [0.0, 1.0]
        # In several shapes, so that what is normalised over another dimension shows.
        for sizes in ((2,), (2, 3), (3, 1, 2)):
            # Small, so that epsilon shows.
            x = torch.randn(*sizes, *shape, generator=generator, dtype=torch.float32) * known**0.5
            x_hat = x * (x.square().mean(-1, keepdim=True) + known).rsqrt()
            try:
                y = type(module).forward(_stand_in(module, weight), x.clone())
            except Exception:  # a forward of another kind; whatever it raises, it is not this operator
                return None
            if not isinstance(y, Tensor) or y.shape != x.shape:
                return None
            offsets = [each for each in offsets if torch.allclose(y, x_hat * (weight + each), rtol=1e-4, atol=1e-5)]
        return (offsets[0], epsilon) if offsets else None


def _stand_in(module: nn.Module, weight: Tensor) -> nn.Module:
    """A module in training mode with the attributes of `module`, this weight, and zeros for its buffers."""
    stand_in = copy.copy(module)
    buffers = {name: None if b is None else torch.zeros(b.shape, dtype=b.dtype) for name, b in module._buffers.items()}
    stand_in.__dict__ = {
        **module.__dict__,
        "_parameters": {name: nn.Parameter(weight.clone()) for name, _ in module.named_parameters(recurse=False)},
        "_buffers": buffers,
        "training": True,
    }
    return stand_in
