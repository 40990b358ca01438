"""Draw a program for a seed.

Statements are tried on a tensor as they are drawn, and those that raise are dropped: so shapes fit without a word about
them in the grammar. A few that raise are kept, as razor must raise where dense training does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from . import grammar_calls as calls
from .grammar_layers import LAYERS
from .models import draw_model
from .procedures import FIRST_ORDER, SECOND_ORDER
from .program import SETTINGS, Block, Program, Statement, _namespace
from .run import execute

MOST_ELEMENTS = 3000

_IN_PLACE = re.compile(r"[a-z]_\(|[-+*/]= |\] = |inplace=True")

_CALLS: dict[str, tuple[Callable[[Random, Tensor], calls.Lines | None], int]] = {
    "functional call": (calls.functional, 22),
    "view": (calls.view, 14),
    "gated product": (calls.gate, 5),
    "in-place change": (calls.in_place, 6),
    "observer": (calls.observer, 3),
}

_WRAPPERS = {
    "plain block": (8, "x = self.NAME(x)"),
    "block called twice": (3, "x = self.NAME(self.NAME(x))"),
    "residual block": (4, "x = x + self.NAME(x)"),
    "residual block, in place": (1, "r = x\nx = self.NAME(x)\nx += r"),
    "checkpoint": (4, "x = checkpoint(self.NAME, x, use_reentrant=False)"),
    "reentrant checkpoint": (3, "x = checkpoint(self.NAME, x, use_reentrant=True)"),
    "no_grad": (1, "with torch.no_grad():\n    x = self.NAME(x)"),
    "input detached": (1, "x = self.NAME(x.detach())"),
    "saved on CPU": (2, "with copied_to_cpu():\n    x = self.NAME(x)"),
    "saved-tensor hooks": (
        2,
        "with saved_tensors_hooks(lambda t: [t.clone()], lambda kept: kept[0]):\n    x = self.NAME(x)",
    ),
    "gated by a block": (1, "x = x * self.NAME(x).sigmoid()"),
    "gate of a block": (1, "x = F.silu(x) * self.NAME(x)"),
    "two branches": (1, "x = torch.cat([self.NAME(x), self.NAME(2 * x)])"),
    "float32 block": (1, "x = self.NAME(x).float().to(x.dtype)"),
}

_LOSSES = {
    "weighted sum": (10, "loss = weighted_sum(y)"),
    "mean square": (3, "loss = y.square().mean()"),
    "sum": (1, "loss = y.sum()"),
    "MSE": (2, "loss = F.mse_loss(y, torch.zeros_like(y))"),
    "cross entropy": (3, "loss = class_loss(y)"),
    "label smoothing": (1, "loss = class_loss(y, label_smoothing=0.1)"),
    "custom Function loss": (2, "loss = function_loss(y)"),
    "TorchScript loss": (1, "loss = scripted_loss(y)"),
    "logsumexp": (1, "loss = y.logsumexp(-1).sum()"),
    "checkpointed loss": (1, "loss = checkpoint(weighted_sum, y, use_reentrant=True)"),
    "loss changes output in place": (1, "loss = weighted_sum(y.mul_(2))"),
}

_SHAPES = {"rows": 2, "tokens": 5, "map": 5, "volume": 1, "ids": 2}


class _Scope:
    """Names and the tensor that statements are tried on."""

    def __init__(self, rng: Random, x: Tensor) -> None:
        self.rng, self.x = rng, x
        self.count = 0
        self.saved: list[str] = []
        self.names: dict[str, Any] = {}
        self.last = ""

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def tries(self, run: str, init: str) -> bool:
        """Run these lines; false, with `x` as before, if they raise or what they make is not wanted."""
        names = {**_namespace(), **self.names, "self": self.names["self"], "x": self.x.clone()}
        try:
            with torch.no_grad():
                exec(init, names)
                exec(run, names)
        except Exception:
            return False
        x = names["x"]
        wanted = isinstance(x, Tensor) and 0 < x.dim() <= 5 and x.numel() <= MOST_ELEMENTS and x.is_floating_point()
        if not wanted or (x.numel() == 0 and self.x.numel() > 0):
            return False
        self.names.update({key: names[key] for key in self.saved if key in names})
        self.x = x
        return True


class _Local(nn.Module):
    """What `self` is in a trial."""


def _weighted(rng: Random, table: dict[str, tuple[Any, ...]], index: int) -> str:
    return rng.choices(list(table), [entry[index] for entry in table.values()])[0]


def _statement(scope: _Scope, depth: int) -> Statement | None:
    """One that was run, or None."""
    rng, x = scope.rng, scope.x
    shape, draw = tuple(x.shape), rng.random()
    if draw < 0.13 and depth < 2:
        return _wrapped(scope, depth)
    if draw < 0.20 and scope.saved:
        feature, (run, init) = "with an earlier tensor", calls.with_saved(rng, x)
        run = run.replace("SAVED", rng.choice(scope.saved))
    elif draw < 0.26:
        name = scope.name("r")
        scope.saved.append(name)
        feature, run, init = "kept for later", f"{name} = x", ""
    elif draw < 0.62:
        feature = _weighted(rng, LAYERS, 1)
        if scope.last.endswith("Norm") or "Dropout" in scope.last or "nn." in scope.last or "ACT2FN" in scope.last:
            # What reads the copy of a norm or an activation function is drawn more often behind one.
            feature = rng.choice((feature, feature, "Linear", "Conv", "Dropout"))
        maker = LAYERS[feature][0](rng, x)
        if maker is None:
            return None
        name = scope.name("m")
        run, init = f"x = self.{name}(x)", f"self.{name} = {maker}"
        if feature == "activation" or "inplace=True" in maker:
            feature = (
                maker.replace('ACT2FN["', "ACT2FN ").replace('"]', "")
                if feature == "activation"
                else (f"{feature}, in place")
            )
        elif rng.random() < 0.04:
            feature, run = "layer called twice", f"x = self.{name}(x) + self.{name}(2 * x)"
    else:
        feature = _weighted(rng, _CALLS, 1)
        lines = _CALLS[feature][0](rng, x)
        if lines is None:
            return None
        name = scope.name("p")
        run, init = (text.replace("NAME", name) for text in lines)
        feature = f"{feature}: {lines[0].splitlines()[0]}" if feature != "view" else feature
    if scope.tries(run, init) or (rng.random() < 0.003 and "r" not in run[:1]):
        scope.last = feature
        return Statement(feature, run, init, shape=shape)
    if run.endswith("= x"):
        scope.saved.remove(run.split()[0])
    return None


def _wrapped(scope: _Scope, depth: int) -> Statement | None:
    rng, before = scope.rng, scope.x
    feature = _weighted(rng, _WRAPPERS, 0)
    block = _block(scope, scope.name("B"), rng.choice((1, 2, 2, 3, 4)), depth + 1)
    scope.x = before
    if not block.statements:
        return None
    name = scope.name("b")
    run = _WRAPPERS[feature][1].replace("NAME", name)
    names = {**_namespace()}
    try:
        for text in block.classes():
            exec(text, names)
    except Exception:
        return None
    scope_names, scope.names = scope.names, {**scope.names, **names}
    works = scope.tries(run, f"self.{name} = {block.name}()")
    scope.names = scope_names
    return Statement(feature, run, f"self.{name} = {block.name}()", block, tuple(before.shape)) if works else None


def _block(scope: _Scope, name: str, length: int, depth: int) -> Block:
    outer_saved, outer_names = scope.saved, scope.names
    scope.saved, scope.names = [], {"self": _Local()}
    statements: list[Statement] = []
    for _ in range(4 * length):
        if len(statements) < length and (statement := _statement(scope, depth)) is not None:
            statements.append(statement)
    scope.saved, scope.names = outer_saved, outer_names
    return Block(name, tuple(statements))


def _input(rng: Random) -> tuple[str, Tensor, str, list[Statement]]:
    """Its kind, a tensor like it, its code, and statements that make it one that layers can work on."""
    kind = rng.choices(list(_SHAPES), list(_SHAPES.values()))[0]
    batch = 0 if rng.random() < 0.015 else rng.choice((1, 2, 2, 3, 4))
    width = rng.choice((1, 2, 3, 4, 4, 5, 6, 8, 8, 12, 16, 24))
    sides = (1, 3, 4, 5, 5, 6, 7)
    channels = rng.choice((1, 2, 3, 4, 4, 6))
    shape = {
        "rows": (batch, width),
        "tokens": (batch, rng.choice((1, 2, 3, 4, 5, 7)), width),
        "map": (batch, channels, rng.choice(sides), rng.choice(sides)),
        "volume": (max(1, min(batch, 2)), channels, rng.choice((1, 2, 3)), 3, rng.choice((2, 4))),
        "ids": (batch, rng.choice((1, 3, 5))),
    }[kind]
    if kind == "ids":
        return kind, torch.zeros(shape, dtype=torch.long), f"torch.randint(11, {shape})", []
    scale = rng.choice(("", "", "", "", " * 3", " * 0.1"))
    code = f"torch.randn({shape}, dtype=DTYPE){scale}"
    if rng.random() < 0.15:
        kind += ", not contiguous"
        wide, turned = (*shape[:-1], 2 * shape[-1]), (*shape[:-2], shape[-1], shape[-2])
        code = rng.choice(
            (f"torch.randn({wide}, dtype=DTYPE)[..., ::2]", f"torch.randn({turned}, dtype=DTYPE).mT")
            + (f"torch.randn({(1, *shape[1:])}, dtype=DTYPE).expand({', '.join(map(str, shape))})",)
            + ((f"({code}).to(memory_format=torch.channels_last)",) * 3 if len(shape) == 4 else ())
        )
    return kind, torch.randn(shape), code, []


def _embedding(scope: _Scope) -> Statement:
    width = scope.rng.choice((4, 6, 8, 12))
    options = scope.rng.choice(("", "", ", padding_idx=0", ", scale_grad_by_freq=True", ", max_norm=1.0"))
    shape, scope.x = tuple(scope.x.shape), torch.randn(*scope.x.shape, width)
    return Statement("Embedding", "x = self.e0(x)", f"self.e0 = nn.Embedding(11, {width}{options})", shape=shape)


def _setting(rng: Random) -> str:
    weights = {"lossless": 36, "all kept": 7, "x_hat": 8, "origins": 15, "near": 12, "balanced": 9, "fast": 2}
    weights |= {"paper": 6, "autocast": 5, "small ones dense": 4}
    return rng.choices(list(weights), list(weights.values()))[0]


def _changes(rng: Random, model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Lines before and after razor, and their features."""
    before: list[str] = []
    after: list[str] = []
    features: list[str] = []
    modules = {name: module for name, module in model.named_modules() if name}
    layers = {name: module for name, module in modules.items() if not list(module.children())}
    weights = dict(model.named_parameters())

    def add(feature: str, line: str, late: bool = False) -> None:
        features.append(f"{feature}, after razor" if late else feature)
        (after if late else before).append(line)

    def get(name: str) -> str:
        return f'model.get_submodule("{name}")'

    if weights and rng.random() < 0.12:
        add("frozen parameter", f'model.get_parameter("{rng.choice(list(weights))}").requires_grad_(False)')
    if modules and rng.random() < 0.10:
        add("frozen module", f"{get(rng.choice(list(modules)))}.requires_grad_(False)", rng.random() < 0.3)
    if rng.random() < 0.02:
        add("everything frozen", "model.requires_grad_(False)")
    if modules and rng.random() < 0.06:
        add("module in eval mode", f"{get(rng.choice(list(modules)))}.eval()", True)
    if rng.random() < 0.08:
        pairs = [(a, b) for a in weights for b in weights if a < b and weights[a].shape == weights[b].shape]
        if pairs:
            (one, other) = rng.choice(pairs)
            owner, _, name = other.rpartition(".")
            add("tied weights", f'{get(owner)}.{name} = model.get_parameter("{one}")')
    if rng.random() < 0.05:
        pairs = [(a, b) for a in layers for b in layers if a < b and repr(layers[a]) == repr(layers[b])]
        if pairs:
            (one, other) = rng.choice(pairs)
            add("shared layer", f'model.set_submodule("{other}", {get(one)})')
    if modules and rng.random() < 0.16:
        target = get(rng.choice(list(modules)))
        feature, line = rng.choice(
            [
                ("forward hook", "register_forward_hook(lambda module, args, output: output * 0.5)"),
                ("forward hook, in place", "register_forward_hook(lambda module, args, output: output.mul_(0.5))"),
                ("forward pre-hook", "register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))"),
                ("forward pre-hook, in place", "register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))"),
                ("full backward hook", "register_full_backward_hook(lambda module, given, got: (given[0],))"),
                (
                    "full backward hook that changes",
                    "register_full_backward_hook("
                    "lambda module, given, got: tuple(g if g is None else g * 0.5 for g in given))",
                ),
                ("full backward pre-hook", "register_full_backward_pre_hook(lambda module, got: (got[0] * 0.5,))"),
            ]
        )
        add(feature, f"{target}.{line}", rng.random() < 0.5)
    weighted = [name for name, m in layers.items() if getattr(m, "weight", None) is not None and m.weight.dim() > 1]
    if weighted and rng.random() < 0.08:
        target = get(rng.choice(weighted))
        feature, line = rng.choice(
            [
                ("spectral_norm", f"nn.utils.parametrizations.spectral_norm({target})"),
                ("weight_norm", f"nn.utils.parametrizations.weight_norm({target})"),
                ("old spectral_norm", f"nn.utils.spectral_norm({target})"),
                ("old weight_norm", f"nn.utils.weight_norm({target})"),
                ("orthogonal", f"nn.utils.parametrizations.orthogonal({target})"),
                ("pruned", f'prune.random_unstructured({target}, "weight", 0.3)'),
            ]
        )
        # Their random start is part of the model; the global state at the time is the same for both.
        add(feature, line, rng.random() < 0.5)
    if rng.random() < 0.015:
        add("copied model", "import copy\nmodel = copy.deepcopy(model)", True)
    return before, after, features


def draw_program(seed: int, setting: str | None = None) -> Program:
    """The program of this seed.

    Args:
        seed: any integer of at least 0.
        setting: a name in `SETTINGS` (default: drawn).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(20):
            rng = Random(seed + attempt * 2**32)
            drawn = _setting(rng)
            torch.manual_seed(seed)
            program = _draw(rng, seed, setting or drawn)
            if _meets_a_bug_of_torch(program):
                continue
            error = execute(program).error
            # One in ten that raises stays: razor must raise as well.
            if error is None or rng.random() < 0.1:
                break
    return replace(program, features=program.features | ({"raises"} if error is not None else set()))


def _meets_a_bug_of_torch(program: Program) -> bool:
    """Whether the program may do what torch 2.13 does wrong."""
    source = program.source()
    # GroupNorm's backward ends the process for channels-last input that needs no gradient.
    needs_none = not program.needs_grad or any(word in source for word in ("detach", "no_grad", "requires_grad_"))
    if needs_none and "channels_last" in source and ("GroupNorm" in source or "group_norm" in source):
        return True
    # A hook of a view is forgotten when the view is changed in place; a linear layer returns a view of its own result.
    return "register_hook" in source and bool(_IN_PLACE.search(source))


def _draw(rng: Random, seed: int, setting: str) -> Program:
    features = [f"setting: {setting}"]
    if rng.random() < 0.06 * (SETTINGS[setting].dtype == "float64") + 0.04:
        block, model, x, kind, compute, more = None, *draw_model(rng)
        features += more
        needs_grad = kind != "ids" and rng.random() < 0.5
    else:
        kind, tensor, x, statements = _input(rng)
        scope = _Scope(rng, tensor)
        if kind == "ids":
            statements = [_embedding(scope)]
        if tensor.numel() == 0:
            features.append("empty batch")
        block = _block(scope, "Program", rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 8)), 0)
        block = Block("Program", (*statements, *block.statements))
        model = "Program()"
        loss = _weighted(rng, _LOSSES, 0)
        compute = ("y = model(x)", 'record("output", y)', _LOSSES[loss][1])
        features += [f"loss: {loss}"]
        needs_grad = kind != "ids" and rng.random() < 0.6
    features += [f"input: {kind}"] + ["input requires gradient"] * needs_grad
    table = SECOND_ORDER if rng.random() < 0.06 else FIRST_ORDER
    procedure = rng.choices(list(table), list(table.values()))[0].__name__
    if SETTINGS[setting].whole and procedure == "two_steps":  # the second starts elsewhere
        procedure = "accumulated"
    if setting == "fast":  # its backward draws random numbers, so dropout in a later forward draws others
        procedure = "plain"
    unload = rng.random() < 0.08 and setting != "fast"
    features += [f"procedure: {procedure}"] + ["unloaded"] * unload
    nothing = frozenset()
    program = Program(seed, setting, block, model, x, needs_grad, (), (), compute, procedure, unload, nothing)
    try:
        before, after, more = _changes(rng, program.build().make())
    except Exception:  # a model that cannot be made is one that razor need not make, either
        before, after, more = [], [], ["cannot be made"]
    features += more + (list(block.features()) if block is not None else [])
    return replace(program, before=tuple(before), after=tuple(after), features=frozenset(features))
