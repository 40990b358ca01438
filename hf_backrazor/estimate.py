"""What a forward will save for backward, known before there is a batch, or memory to run it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from .report import SavedBytes, record_saved_bytes


def estimate_saved_bytes(
    model: nn.Module, batch_shape: Sequence[int] | Mapping[str, Sequence[int]], labels: bool = True
) -> SavedBytes:
    """What a training forward of `model` saves for backward, from shapes alone.

    Nothing is computed and no activation is allocated: the forward runs on fake tensors, which have shape, dtype and
    device. The weights are not touched, and may be on the meta device.

    Args:
        model: a Transformers or PEFT model, dense or razor.
        batch_shape: shape of the model's main input, such as `(8, 128)` tokens or `(8, 3, 224, 224)` pixels; or of
            several inputs, by name. Inputs called "pixel_values" or "input_features" are in the model's dtype, all
            others integers.
        labels: whether the model computes its loss, if it can.

    Returns:
        As `measure_saved_bytes`.

    Raises:
        ValueError: the model's forward has no input of a name in `batch_shape`.
    """
    shapes = dict(batch_shape) if isinstance(batch_shape, Mapping) else {_main_input(model): tuple(batch_shape)}
    accepted = inspect.signature(_forward_of(model)).parameters
    for name in shapes:
        if name not in accepted:
            raise ValueError(f"{type(model).__name__} has no input {name!r}: expected some of {', '.join(accepted)}")
    if labels and "labels" in accepted and "labels" not in shapes:
        main = shapes[_main_input(model)]
        shapes["labels"] = tuple(main) if _predicts_tokens(model) else (main[0],)

    floating = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if floating is None else floating.dtype
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    # On the model's device, not on meta: attention picks its kernel, and with it what it saves, by device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: _fake(x, device) for name, x in (*model.named_parameters(), *model.named_buffers())}
        batch = {
            name: torch.empty(tuple(shape), device=device, dtype=dtype if name in _FLOATING else torch.int64)
            for name, shape in shapes.items()
        }
        known = [*state.values(), *batch.values()]
        # With neither cache nor mask, Transformers looks at the position ids for packed sequences; on fake tensors it
        # cannot, and makes a mask of length x length that a real forward does without. The cache itself is not saved.
        options = {"use_cache": True} if "use_cache" in accepted else {}
        return record_saved_bytes(model, known, lambda: functional_call(model, state, (), {**batch, **options}))


_FLOATING = ("pixel_values", "input_features", "input_values", "inputs_embeds")


def _fake(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device).requires_grad_(x.requires_grad)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _main_input(model: nn.Module) -> str:
    return getattr(_base(model), "main_input_name", "input_ids")


def _forward_of(model: nn.Module) -> Any:
    # A razor model's and a PEFT model's own forward take anything.
    base = _base(model)
    return getattr(type(base), "plain_class", type(base)).forward


def _predicts_tokens(model: nn.Module) -> bool:
    base = _base(model)
    return hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is not None
