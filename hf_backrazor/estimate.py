"""What a training step will take, known before there is a batch, or memory to run it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .live_memory import LiveMemory
from .report import SavedBytes, record_saved_bytes, recording_saved_bytes, repeated_for_gates, undisturbed
from .shapes_only import ShapesOnly


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
    with _on_fake_tensors(model, batch_shape, labels) as fake:
        call = functools.partial(functional_call, model, fake.state, (), {**fake.batch, **fake.options})
        return record_saved_bytes(model, fake.known, call)


@dataclass(frozen=True)
class StepMemory:
    """What a training step holds at its peak, in bytes.

    Attributes:
        weights: parameters and buffers.
        optimizer: the optimizer's state.
        step: what forward and backward hold at most at a time: activations and gradients, as these come and go.
        saved: what forward saves for backward, as `estimate_saved_bytes` counts it; a part of `step`.
    """

    weights: int
    optimizer: int
    step: int
    saved: int

    @property
    def total(self) -> int:
        """Weights, the optimizer's state and the step."""
        return self.weights + self.optimizer + self.step


def estimate_step_memory(
    model: nn.Module,
    batch_shape: Sequence[int] | Mapping[str, Sequence[int]],
    optimizer_states: int = 2,
) -> StepMemory:
    """What a training step of `model` holds at its peak, from shapes alone.

    Forward and backward run on fake tensors, as for `estimate_saved_bytes`, and every tensor counts while it lives.
    Gradients are made by backward, as after `optimizer.zero_grad()`. Left out are what single operators need inside,
    what the allocator wastes, and what the optimizer's step allocates.

    Args:
        model: a Transformers or PEFT model that computes its loss, dense or razor, with or without activation
            checkpointing.
        batch_shape: as for `estimate_saved_bytes`.
        optimizer_states: tensors that the optimizer holds for each parameter that is trained: 2 for AdamW, 1 for SGD
            with momentum, 0 for SGD.

    Raises:
        ValueError: the model's forward has no input of a name in `batch_shape`, or computes no loss.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with _on_fake_tensors(model, batch_shape, labels=True) as fake, undisturbed(model), torch.enable_grad():
        state = {f"model.{name}": x for name, x in fake.state.items()}
        step = _Step(model, fake.known)

        def run() -> tuple[LiveMemory, SavedBytes]:
            with LiveMemory(fake.known) as live:
                return live, functional_call(step, state, (), {**fake.batch, **fake.options})

        live, saved = repeated_for_gates(model, run)
    weights = sum(x.nbytes for x in fake.state.values())
    return StepMemory(weights, optimizer_states * trained, live.peak, saved.total)


class _Step(nn.Module):
    """Forward and backward in one call, for which the model has the parameters that it is called with."""

    def __init__(self, model: nn.Module, known: list[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.known = known

    def forward(self, **batch: Any) -> SavedBytes:
        with recording_saved_bytes(self.model, self.known) as saved:
            output = self.model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(f"{type(self.model).__name__} computes no loss: expected a model with a head for a task")
        del output  # backward does without the logits
        loss.backward()
        return saved


class _FakeBatch(NamedTuple):
    state: dict[str, Tensor]
    batch: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def known(self) -> list[Tensor]:
        """What is there before the step."""
        return [*self.state.values(), *self.batch.values()]


@contextmanager
def _on_fake_tensors(
    model: nn.Module, batch_shape: Sequence[int] | Mapping[str, Sequence[int]], labels: bool
) -> Iterator[_FakeBatch]:
    """A context in which tensors are fake; fake parameters and buffers of `model`, and a batch for it."""
    shapes = dict(batch_shape) if isinstance(batch_shape, Mapping) else {_main_input(model): tuple(batch_shape)}
    accepted = inspect.signature(_forward_of(model)).parameters
    for name in shapes:
        if name not in accepted:
            raise ValueError(f"{type(model).__name__} has no input {name!r}: expected some of {', '.join(accepted)}")
    if labels:
        shapes.update((name, shape) for name, shape in _label_shapes(model, shapes) if name in accepted)

    floating = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if floating is None else floating.dtype
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    # On the model's device, not on meta: attention picks its kernel, and with it what it saves, by device.
    with ShapesOnly(allow_non_fake_inputs=True):
        state = {name: _fake(x, device) for name, x in (*model.named_parameters(), *model.named_buffers())}
        batch = {
            name: torch.empty(tuple(shape), device=device, dtype=dtype if name in _FLOATING else torch.int64)
            for name, shape in shapes.items()
        }
        # With neither cache nor mask, Transformers looks at the position ids for packed sequences; on fake tensors it
        # cannot, and makes a mask of length x length that a real forward does without. The cache itself is not saved.
        options = {"use_cache": True} if "use_cache" in accepted else {}
        yield _FakeBatch(state, batch, options)


def _label_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of the labels that such a model may take and that are not among `shapes`."""
    main = tuple(shapes[_main_input(model)])
    if "SemanticSegmentation" in type(_base(model)).__name__:
        each = (main[0], *main[2:])
    else:
        each = main if _predicts_tokens(model) else (main[0],)
    for name, shape in (("labels", each), ("start_positions", (main[0],)), ("end_positions", (main[0],))):
        if name not in shapes:
            yield name, shape


_FLOATING = ("pixel_values", "input_features", "input_values", "inputs_embeds")


def _fake(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device).requires_grad_(x.requires_grad)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _main_input(model: nn.Module) -> str:
    return getattr(_base(model), "main_input_name", "input_ids")


def _forward_of(model: nn.Module) -> Any:
    # A razor model's and a PEFT model's own forward take anything.
    base = _base(model)
    return getattr(type(base), "plain_class", type(base)).forward


def _predicts_tokens(model: nn.Module) -> bool:
    base = _base(model)
    if "TokenClassification" in type(base).__name__:
        return True
    return hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is not None
