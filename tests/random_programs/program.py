"""A program as data, and as plain code."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import indent
from types import SimpleNamespace
from typing import Any

IMPORTS = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
import transformers
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from hf_backrazor import RazorConfig, get_razor_model
from tests.random_programs.pieces import *
from tests.random_programs.procedures import *
"""


@dataclass(frozen=True)
class Statement:
    """One step of a forward.

    Attributes:
        feature: what it is an example of.
        run: its lines in the forward; they read and write `x`.
        init: its lines in the constructor.
        block: a class that it makes an object of.
        shape: of `x` before it.
    """

    feature: str
    run: str
    init: str = ""
    block: Block | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """A module class whose forward is a list of statements."""

    name: str
    statements: tuple[Statement, ...]

    def classes(self) -> Iterator[str]:
        """Code of this class, after those it needs."""
        for statement in self.statements:
            if statement.block is not None:
                yield from statement.block.classes()
        init = "\n".join(["super().__init__()", *(s.init for s in self.statements if s.init)])
        run = "\n".join([*(s.run for s in self.statements), "return x"])
        yield (
            f"class {self.name}(nn.Module):\n    def __init__(self):\n{indent(init, ' ' * 8)}\n\n"
            f"    def forward(self, x):\n{indent(run, ' ' * 8)}\n"
        )

    def features(self) -> Iterator[str]:
        """Of all statements."""
        for statement in self.statements:
            yield statement.feature
            if statement.block is not None:
                yield from statement.block.features()


@dataclass(frozen=True)
class Setting:
    """How razor is configured, and how near its gradients must be.

    Attributes:
        config: code of the configuration.
        dtype: of model and input.
        tolerance: relative difference allowed to each gradient.
        noise: relative perturbation of input and parameters that the dense model's own movement is measured by.
        factor: how many times that movement explains a difference.
        floor: difference allowed, relative to the norm of all gradients.
        whole: compare only the direction of all gradients together.
    """

    config: str
    dtype: str = "float64"
    tolerance: float = 1e-9
    noise: float = 2.0**-52
    factor: float = 100.0
    floor: float = 1e-13
    whole: bool = False


SETTINGS = {
    "lossless": Setting('RazorConfig.preset("lossless")'),
    "all kept": Setting('RazorConfig.preset("paper", sparsity=0.0, value_dtype="auto", activation_bits=32)'),
    "x_hat": Setting("RazorConfig(sparsity=0.0, qkv_bits=32, activation_bits=32)"),
    "small ones dense": Setting('RazorConfig.preset("lossless", min_numel=40)'),
    # Codes for a millionth of the elements, which is none: norms, activation functions and paddings serve as origins
    # of what stands behind them, and yet every value has 24 bits.
    "origins": Setting(
        'RazorConfig(sparsity=1e-6, residual_bits=4, norm_bits=4, value_dtype="float32", qkv_bits=32,'
        " activation_bits=32)",
        tolerance=1e-5,
        noise=2.0**-24,
        floor=1e-6,
    ),
    "near": Setting(
        "RazorConfig(sparsity=0.01, residual_bits=4, norm_bits=4, qkv_bits=8, activation_bits=8)",
        "float32",
        tolerance=0.14,  # a cosine of 0.99
        noise=2.0**-7,
        factor=10.0,
        floor=0.01,
    ),
    "balanced": Setting("RazorConfig()", "float32", noise=0.1, whole=True),
    "fast": Setting('RazorConfig.preset("fast")', "float32", noise=0.1, whole=True),
    "paper": Setting('RazorConfig.preset("paper", sparsity=0.8)', "float32", noise=0.1, whole=True),
    "autocast": Setting(
        'RazorConfig.preset("lossless")', "float32", tolerance=0.05, noise=2.0**-8, factor=10.0, floor=1e-3
    ),
}


@dataclass(frozen=True)
class Program:
    """A model, its input, and what is done with them.

    Attributes:
        seed: what it was drawn with; weights and input are drawn with it, too.
        setting: a name in `SETTINGS`.
        blocks: the model's class; none if `model` is a class of Transformers.
        model: code that makes the model.
        x: code that makes the input.
        needs_grad: whether the input requires gradients.
        before: lines about `model`, before `get_razor_model`.
        after: lines about `model`, after it.
        compute: lines that compute `loss` from `model` and `x`.
        procedure: a name in `PROCEDURES`.
        unload: whether the model is unloaded at the end, and trained once more.
    """

    seed: int
    setting: str
    block: Block | None
    model: str
    x: str
    needs_grad: bool
    before: tuple[str, ...]
    after: tuple[str, ...]
    compute: tuple[str, ...]
    procedure: str
    unload: bool
    features: frozenset[str]

    def computes_in_float32(self) -> bool:
        """Whether something in it rounds to float32, whatever the dtype of the model."""
        return self.block is None or "Llama" in self.source()

    def source(self) -> str:
        """The code, up to what runs it."""
        dtype = SETTINGS[self.setting].dtype
        compute = list(self.compute)
        if self.setting == "autocast":
            compute = ['with torch.autocast("cpu", dtype=torch.bfloat16):', *(f"    {line}" for line in compute)]
        functions = [
            *(self.block.classes() if self.block is not None else ()),
            _function("make()", [f"model = randomise({self.model}).to(torch.{dtype})", *self.before, "return model"]),
            _function("after(model)", [*self.after, "return model"]),
            _function("draw()", [f"return {self.x.replace('DTYPE', f'torch.{dtype}')}"]),
            _function("compute(model, x, record)", [*compute, 'record("loss", loss)', "return loss"]),
        ]
        return "\n\n".join(functions)

    def script(self) -> str:
        """Code that runs by itself and prints how gradients differ."""
        config = SETTINGS[self.setting].config
        return (
            f"{IMPORTS}\n\n{self.source()}\n\n"
            f"def run(razor):\n    torch.manual_seed({self.seed})\n    model = make().train()\n"
            f"    if razor:\n        get_razor_model(model, {config})\n    model = after(model)\n"
            f"    x = draw(){'.requires_grad_()' if self.needs_grad else ''}\n"
            f"    torch.manual_seed({self.seed + 1})\n"
            f"    {self.procedure}(model, x, compute, lambda name, tensor: None)\n"
            + ("    # ... and then model.remove_razor(), and once more\n" if self.unload else "")
            + "    return {'x': x.grad, **{name: p.grad for name, p in model.named_parameters()}}\n\n\n"
            "dense, razor = run(False), run(True)\n"
            "for name in dense:\n    if dense[name] is not None:\n"
            "        print(name, (razor[name] - dense[name]).norm() / dense[name].norm())\n"
        )

    def build(self) -> SimpleNamespace:
        """The functions of the code: `make`, `after`, `draw`, `compute`."""
        names = dict(_namespace())
        text, file = self.source(), f"<program {self.seed}>"
        # Razor reads the source of a forward to find the functions that it calls.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), names)
        return SimpleNamespace(**{name: names[name] for name in ("make", "after", "draw", "compute")})


def _function(signature: str, lines: list[str]) -> str:
    return f"def {signature}:\n{indent(chr(10).join(lines), ' ' * 4)}\n"


_names: dict[str, Any] = {}


def _namespace() -> dict[str, Any]:
    if not _names:
        import torch
        import torch.nn.functional as F
        import transformers
        from torch import nn
        from torch.autograd.graph import saved_tensors_hooks
        from torch.nn.utils import prune
        from transformers.activations import ACT2FN
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
        from transformers.pytorch_utils import Conv1D

        from . import pieces, procedures

        _names.update({k: v for k, v in (*vars(pieces).items(), *vars(procedures).items()) if not k.startswith("_")})
        _names.update(
            torch=torch,
            F=F,
            nn=nn,
            prune=prune,
            transformers=transformers,
            saved_tensors_hooks=saved_tensors_hooks,
            # Looked up when it is called, so that a reference can do without.
            checkpoint=lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(*args, **kwargs),
            ACT2FN=ACT2FN,
            LlamaRMSNorm=LlamaRMSNorm,
            Conv1D=Conv1D,
            __name__=__name__,
        )
    return _names
