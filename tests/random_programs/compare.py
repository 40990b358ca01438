"""Run a program dense and with razor, and say where they differ.

A difference counts if conditioning does not explain it: if the dense model, its input and parameters moved by a unit in
the last place (or by what a coarse setting may be off), moves by far less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .procedures import SECOND_ORDER
from .program import SETTINGS, Program, Setting
from .run import Apply, Run, execute, razor

_SECOND_ORDER = {procedure.__name__ for procedure in SECOND_ORDER}


@dataclass(frozen=True)
class Difference:
    """Where two runs differ.

    Attributes:
        kind: what kind of quantity.
        name: which one.
        text: by how much.
    """

    kind: str
    name: str
    text: str


def differences(program: Program, apply: Apply = razor) -> list[Difference]:
    """How razor differs from dense; empty if it does not.

    Raises:
        NothingToReplace (of `run`): there is nothing to compare.
    """
    actual = execute(program, apply)
    expected = execute(program)
    if expected.error is not None and _is_about_versions(expected.error) and not _same_error(expected, actual):
        # Dense training refuses, as a saved tensor was changed since. A copy of it tells what is right.
        expected = execute(program, saving=_copies)
        if actual.error is not None and _is_about_versions(actual.error):
            return []
    if "is not implemented" in str(expected.error) and actual.error is None:
        return []  # razor may have a second derivative where torch has none
    found = _compare_errors(program, expected, actual)
    if found:
        return found
    if actual.error is not None:  # of the same kind as the dense one's, or razor's own; what follows is cut short
        return _compare_tensors(expected.tensors, actual.tensors, all_of_them=False)
    found = _compare_tensors(expected.tensors, actual.tensors)
    found += _compare_state(program, expected, actual)
    found += _compare_gradients(program, expected, actual)
    if found and "BatchNorm" in program.source() and program.procedure not in _SECOND_ORDER:
        # Torch's own gradient is wrong for some permuted gradients of maps that are one pixel wide (2.13).
        expected = execute(program, saving=WrittenOutBatchNorm)
        if not _compare_gradients(program, expected, actual):
            return []
    if found and "use_reentrant=False" in program.source():
        # Dense gradients are wrong, without a word, where a saved tensor is changed in the second forward: the copies
        # that checkpointing keeps carry no version.
        expected = execute(program, saving=_without_checkpoints)
        if not _compare_gradients(program, expected, actual):
            return []
    return found


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    with _copies(), mock.patch("torch.utils.checkpoint.checkpoint", _called):
        yield


def _called(function: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    return function(*args)


def _copies() -> AbstractContextManager:
    return saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


class WrittenOutBatchNorm(TorchFunctionMode):
    """Batch normalisation in training by its formula."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        return _batch_norm(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    result = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return result
    dims = [d for d in range(input.dim()) if d != 1]
    mean, var = input.mean(dims, keepdim=True), input.var(dims, unbiased=False, keepdim=True)
    x_hat = (input - mean) / (var + eps).sqrt()
    shape = [-1 if d == 1 else 1 for d in range(input.dim())]
    x_hat = x_hat if weight is None else x_hat * weight.view(shape)
    return x_hat if bias is None else x_hat + bias.view(shape)


def _is_about_versions(error: Exception) -> bool:
    return "modified by an inplace operation" in str(error)


def _same_error(expected: Run, actual: Run) -> bool:
    return type(expected.error) is type(actual.error)


def _compare_errors(program: Program, expected: Run, actual: Run) -> list[Difference]:
    if _same_error(expected, actual):
        return []
    if actual.error is not None and expected.error is None:
        if (
            isinstance(actual.error, RuntimeError)
            and "razor" in str(actual.error)
            and ("get_razor_model:" not in str(actual.error))
        ):
            return []
        return [Difference("only razor raises", type(actual.error).__name__, str(actual.error)[:300])]
    if actual.error is None:
        text = f"{type(expected.error).__name__}: {str(expected.error)[:300]}"
        return [Difference("only dense raises", type(expected.error).__name__, text)]
    text = f"{type(expected.error).__name__}: {expected.error!s:.200}; {type(actual.error).__name__}: "
    return [Difference("another error", type(actual.error).__name__, f"{text}{actual.error!s:.200}")]


def _compare_tensors(
    expected: dict[str, Tensor], actual: dict[str, Tensor], all_of_them: bool = True
) -> list[Difference]:
    if all_of_them and expected.keys() != actual.keys():
        return [Difference("forward", "names", f"{list(expected)} and {list(actual)}")]
    for name in expected.keys() & actual.keys():
        one, other = expected[name], actual[name]
        loss = "loss" in name  # of a language model: computed in tiles
        if one.shape != other.shape or one.dtype != other.dtype:
            return [Difference("forward", name, f"{one.shape}, {one.dtype} and {other.shape}, {other.dtype}")]
        same = torch.allclose(one, other, 1e-5, 1e-5, equal_nan=True) if loss else _equal(one, other)
        if not same:
            return [Difference("forward", name.split(" ", 1)[1], f"by {(one - other).abs().max().item():.3g}")]
    return []


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or (
        one.shape == other.shape and one.is_floating_point() and torch.allclose(one, other, 0, 0, equal_nan=True)
    )


def _compare_state(program: Program, expected: Run, actual: Run) -> list[Difference]:
    if expected.state.keys() != actual.state.keys():
        names = expected.state.keys() ^ actual.state.keys()
        return [Difference("state", "names", ", ".join(sorted(names)))]
    moved = program.procedure == "two_steps"  # buffers then depend on gradients
    for name, one in expected.state.items():
        other = actual.state[name]
        if name == "random state" and program.setting == "fast":  # draws to round gradients
            continue
        if moved and name != "random state":
            continue
        if not _equal(one, other):
            return [Difference("state", name if name == "random state" else name.split(".")[-1], "")]
    return []


def _compare_gradients(program: Program, expected: Run, actual: Run) -> list[Difference]:
    setting = SETTINGS[program.setting]
    if program.computes_in_float32():
        setting = replace(setting, tolerance=max(setting.tolerance, 1e-6), noise=max(setting.noise, 2.0**-24))
    found = []
    for name in expected.gradients:
        one, other = expected.gradients[name], actual.gradients.get(name)
        if other is None and one is not None and program.procedure in _SECOND_ORDER and not one.any():
            continue  # as behind leaky ReLU: torch computes zeros there
        if (one is None) != (other is None):
            found.append(Difference("gradient is missing" if other is None else "gradient too many", name, ""))
        elif one is not None and (one.shape != other.shape or one.dtype != other.dtype):
            found.append(Difference("gradient's shape or dtype", name, f"{one.dtype} and {other.dtype}"))
    if found:
        return found
    pairs = {
        name: (one, actual.gradients[name])
        for name, one in expected.gradients.items()
        if one is not None and actual.gradients.get(name) is not None
    }
    if any(not one.isfinite().all() for one, _ in pairs.values()):
        return []
    if SETTINGS[program.setting].dtype == "float32" and any(
        t.is_floating_point() and t.numel() and t.abs().max() > 1e4 for t in expected.tensors.values()
    ):  # near the end of half precision, which is what such values are kept in
        return []
    total = sum(one.double().square().sum().item() for one, _ in pairs.values()) ** 0.5
    if setting.whole:
        pairs = {name: pair for name, pair in pairs.items() if ": " not in name}
        return _compare_direction(program, pairs, total)
    suspects = {
        name: _norm(one - other)
        for name, (one, other) in pairs.items()
        if not _norm(one - other) <= setting.tolerance * _norm(one) + setting.floor * (total + 1)
    }
    if not suspects:
        return []
    movement = _movement(program, setting, expected, suspects)
    order = " of second order" if program.procedure in _SECOND_ORDER else ""
    for name, difference in suspects.items():
        size = max(_norm(pairs[name][0]), 1e-300)
        if not difference <= setting.factor * movement[name]:
            rounded = ", rounded" if difference <= 1e-6 * size else ""
            moved = movement[name] / size
            text = f"relative {difference / size:.3g}, dense itself moves by {moved:.3g}"
            found.append(Difference(f"gradient{order}{rounded}", name, text))
    return found


def _movement(program: Program, setting: Setting, expected: Run, names: dict[str, float]) -> dict[str, float]:
    """How far the dense model's own gradients move, the most of a few perturbations."""
    most = dict.fromkeys(names, 0.0)
    for moved in _moved(program, setting.noise):
        for name in names:
            grad = moved.gradients.get(name)
            if grad is None or not grad.isfinite().all():
                most[name] = float("inf")
            else:
                most[name] = max(most[name], _norm(grad - expected.gradients[name]))
    return most


def _moved(program: Program, size: float) -> Iterator[Run]:
    """Dense runs with what is computed from, or what is saved for backward, moved by `size` of it."""
    for noise in (1, 2):
        yield execute(program, noise=noise, size=size)
        yield execute(program, saving=lambda noise=noise: _noisy(noise, size))


def _noisy(seed: int, size: float) -> AbstractContextManager:
    generator = torch.Generator().manual_seed(seed)

    def pack(t: Tensor) -> Tensor:
        if not t.is_floating_point() or isinstance(t, torch.nn.Parameter):
            return t
        signs = torch.randint(2, t.shape, generator=generator).double() * 2 - 1
        return (t.detach() * (1 + size * signs)).to(t.dtype)

    return saved_tensors_hooks(pack, lambda t: t)


def _compare_direction(program: Program, pairs: dict[str, tuple[Tensor, Tensor]], total: float) -> list[Difference]:
    if not pairs or total == 0:
        return []
    if any(not other.isfinite().all() for _, other in pairs.values()):
        return [Difference("gradient is not finite", next(iter(pairs)), "")]
    one, other = (torch.cat([pair[i].flatten().double() for pair in pairs.values()]) for i in (0, 1))
    cosine = _cosine(one, other)
    if program.setting == "paper" or cosine > 0.3:  # of tiny tensors, a fifth is next to nothing
        return []
    for run in _moved(program, SETTINGS[program.setting].noise):
        moved = run.gradients
        if any(moved.get(name) is None for name in pairs):
            return []
        if not _cosine(one, torch.cat([moved[name].flatten().double() for name in pairs])) > 0.9:
            return []
    return [Difference("direction of the gradient", "all", f"cosine {cosine:.3g}")]


def _cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def _norm(x: Tensor) -> float:
    return x.double().norm().item()
