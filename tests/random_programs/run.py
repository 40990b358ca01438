"""Run a program, dense or with razor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from hf_backrazor import RazorConfig, get_razor_model

from .procedures import PROCEDURES
from .program import SETTINGS, Program

Apply = Callable[[nn.Module, RazorConfig], nn.Module]


class NothingToReplace(Exception):
    """The program has nothing that razor handles."""


@dataclass
class Run:
    """What one run leaves.

    Attributes:
        tensors: forward results by name, in the order of their appearance.
        gradients: by name; None where there is none.
        state: buffers and random state.
        error: what was raised.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


def razor(model: nn.Module, config: RazorConfig) -> nn.Module:
    """`get_razor_model`, or `NothingToReplace`."""
    try:
        return get_razor_model(model, config)
    except ValueError as error:
        if "nothing to replace" in str(error):
            raise NothingToReplace from error
        raise


def execute(
    program: Program,
    apply: Apply | None = None,
    noise: int = 0,
    size: float = 0.0,
    saving: Callable[[], AbstractContextManager] = nullcontext,
) -> Run:
    """Run a program.

    Args:
        program: what to run.
        apply: what is done to the model; None: nothing, it is dense.
        noise: if not 0, a seed: input and parameters are moved.
        size: by how much, relative to theirs.
        saving: a context for the procedure.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _execute(program, program.build(), apply, (noise, size), saving)


def _execute(
    program: Program,
    code: SimpleNamespace,
    apply: Apply | None,
    noise: tuple[int, float],
    saving: Callable[[], AbstractContextManager],
) -> Run:
    run = Run()
    setting = SETTINGS[program.setting]

    def record(name: str, value: Tensor | None) -> None:
        if "grad" in name or "product" in name:
            run.gradients[f"{len(run.gradients)} {name}"] = None if value is None else value.detach().clone()
        elif value is not None:
            run.tensors[f"{len(run.tensors)} {name}"] = value.detach().clone()

    torch.manual_seed(program.seed)
    model, x, applied = None, None, apply is None
    try:
        model = code.make().train()
        if apply is not None:
            state = torch.get_rng_state()
            apply(model, eval(setting.config, {"RazorConfig": RazorConfig}))
            torch.set_rng_state(state)
            applied = True
        model = code.after(model)
        x = code.draw()
        if noise[0]:
            _move(*noise, model, x)
        x.requires_grad_(program.needs_grad)
        torch.manual_seed(program.seed + 1)
        with saving():
            PROCEDURES[program.procedure](model, x, code.compute, record)
            if program.unload:
                if apply is not None and hasattr(model, "remove_razor"):
                    model.remove_razor()
                # After a step of the optimizer, what follows depends on gradients.
                stepped = "gradient after unloading: " * (program.procedure == "two_steps")
                code.compute(model, x, lambda name, value: record(stepped + name, value)).backward()
    except NothingToReplace:
        raise
    except Exception as error:
        error.__traceback__ = None
        run.error = error
        if not applied:
            run.error = RuntimeError(f"get_razor_model: {type(error).__name__}: {error}")
    if model is not None and x is not None:
        run.gradients |= {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad}
        run.state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        run.state |= {"random state": torch.get_rng_state(), "value of the input": x.detach()}
    return run


def _move(seed: int, noise: float, model: nn.Module, x: Tensor) -> None:
    """Move parameters and input by `noise` of their size, up or down."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), x):
            if tensor.is_floating_point():
                signs = torch.randint(2, tensor.shape, generator=generator).double() * 2 - 1
                tensor.mul_(1 + noise * signs)
