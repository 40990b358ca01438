"""Where the memory goes: bytes that a training forward saves for backward, measured."""

from __future__ import annotations

import linecache
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .compat import tree_leaves
from .functional.rng import HostRandomState, forked_rng
from .modules import OPERATORS, RazorModule, count_gates, running_sums, sees_probes
from .saved_tensors import noting_saved

Measured = TypeVar("Measured")

# Where a module saves less than so many times less with razor, a report names the line.
FEW = 6


@dataclass(frozen=True)
class SavedBytes:
    """What one forward saved for backward.

    Attributes:
        by_module: module name -> bytes saved while that module (and none inside it) was running. `""` is the model
            itself, where a loss is computed.
        elements: module name -> elements of the tensors saved there.
        by_line: module name -> line of code -> bytes saved there by operators that are none of razor's.
    """

    by_module: dict[str, int]
    elements: dict[str, int]
    by_line: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.by_module.values())


@dataclass(frozen=True)
class ModuleMemory:
    """One module's row in a `MemoryReport`.

    Attributes:
        name: as in `named_modules()`.
        kind: kind of operator (`"linear"`, `"norm"`, `"activation"`, `"dropout"`, `"attention"`), or `"other"`.
        dense_bytes: saved for backward without razor.
        razor_bytes: saved for backward with razor.
        elements: of the tensors that are saved without razor.
        line: where with razor most of it is saved that no operator of razor takes, if that is most of all: file, number
            and text of the line.
    """

    name: str
    kind: str
    dense_bytes: int
    razor_bytes: int
    elements: int
    line: str | None = None

    @property
    def bits_per_element(self) -> float | None:
        """Bits that razor saves for each element that is saved without it; None if nothing is."""
        return 8 * self.razor_bytes / self.elements if self.elements else None


@dataclass(frozen=True)
class MemoryReport:
    """Saved bytes of one forward pass, dense and razor side by side.

    A tensor that several operators save is counted once, for the first: a linear layer that reads a norm's x_hat shows
    next to nothing. Parameters, buffers and the batch itself are left out: they are there anyway. Bits an element are
    those that razor saves for each element that dense training saves.

    Attributes:
        modules: a row for each module that saves anything, in the model's order.
    """

    modules: list[ModuleMemory] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, dense: SavedBytes, razor: SavedBytes) -> MemoryReport:
        """Put two measurements of `model` side by side."""
        rows = []
        for name, module in model.named_modules():
            dense_bytes, razor_bytes = dense.by_module.get(name, 0), razor.by_module.get(name, 0)
            if dense_bytes or razor_bytes:
                line, most = max(razor.by_line.get(name, {}).items(), key=lambda each: each[1], default=(None, 0))
                line = line if 2 * most > razor_bytes else None
                elements = dense.elements.get(name, 0)
                rows.append(ModuleMemory(name, _kind(module), dense_bytes, razor_bytes, elements, line))
        return cls(rows)

    @property
    def dense_bytes(self) -> int:
        """Total saved without razor."""
        return sum(row.dense_bytes for row in self.modules)

    @property
    def razor_bytes(self) -> int:
        """Total saved with razor."""
        return sum(row.razor_bytes for row in self.modules)

    @property
    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Kind of operator -> (dense bytes, razor bytes), greatest first."""
        return {row.name: (row.dense_bytes, row.razor_bytes) for row in self._kinds()}

    def _kinds(self) -> list[ModuleMemory]:
        """One row for all modules of a kind, greatest first."""
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for row in self.modules:
            for i, size in enumerate((row.dense_bytes, row.razor_bytes, row.elements)):
                sums[row.kind][i] += size
        rows = [ModuleMemory(kind, kind, dense, razor, n) for kind, (dense, razor, n) in sums.items()]
        return sorted(rows, key=lambda row: -row.dense_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "dense_bytes": self.dense_bytes,
            "razor_bytes": self.razor_bytes,
            "by_kind": {
                row.name: {
                    "dense_bytes": row.dense_bytes,
                    "razor_bytes": row.razor_bytes,
                    "bits_per_element": row.bits_per_element,
                }
                for row in self._kinds()
            },
            "modules": [asdict(row) for row in self.modules],
        }

    def to_string(self, modules: int | None = 5) -> str:
        """The kinds of operator as a table, and below it the modules that save most with razor.

        Args:
            modules: how many modules to list; None: all, in the model's order.
        """
        kinds = self._kinds()
        elements = sum(row.elements for row in kinds)
        kinds.append(ModuleMemory("total", "total", self.dense_bytes, self.razor_bytes, elements))
        listed = self.modules
        if modules is not None:
            listed = sorted(self.modules, key=lambda row: -row.razor_bytes)[:modules]
        tables = [_table("saved for backward", kinds), _table("by module" if modules is None else "most", listed)]
        if dense := [row for row in listed if row.line is not None and row.dense_bytes < FEW * row.razor_bytes]:
            tables.append("\n".join(["saved as it is", *(f"{row.name or '(model)'}  {row.line}" for row in dense)]))
        return "\n\n".join(tables)

    def __str__(self) -> str:
        return self.to_string()


def measure_saved_bytes(model: nn.Module, **batch: Any) -> SavedBytes:
    """Run one training-mode forward of any model, and measure what it saves for backward.

    Counts the storages that autograd holds, each once and whole, without those of parameters, buffers and the batch.
    Mode, buffers and random state are put back.

    Args:
        batch: the arguments of the model's forward.
    """
    return record_saved_bytes(model, _there_before(model, batch), lambda: model(**batch))


def record_saved_bytes(model: nn.Module, known: Iterable[Tensor], forward: Callable[[], Any]) -> SavedBytes:
    """Run `forward`, a forward of `model` in training mode, and count what it saves besides `known`."""
    known = list(known)
    return repeated_for_gates(model, lambda: _record(model, known, forward))


def repeated_for_gates(model: nn.Module, measure: Callable[[], Measured]) -> Measured:
    """What `measure`, which runs a forward of `model`, returns; for the second time if the first has shown gates.

    What activation functions save whose output is multiplied is other from then on.
    """
    before = count_gates(model)
    result = measure()
    return result if count_gates(model) == before else measure()


def _record(model: nn.Module, known: Iterable[Tensor], forward: Callable[[], Any]) -> SavedBytes:
    with undisturbed(model), recording_saved_bytes(model, known) as saved, torch.enable_grad():
        # The result holds the graph until all is counted.
        result = forward()
    del result
    return saved


@contextmanager
def recording_saved_bytes(model: nn.Module, known: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Inside this context, what a forward of `model` saves besides `known` is added to what it yields.

    The forward's result has to live until the context ends: what dies before with its graph does not count.
    """
    by_module: dict[str, int] = defaultdict(int)
    elements: dict[str, int] = defaultdict(int)
    by_line: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    running: list[str] = [""]

    def note(x: Tensor) -> Callable[[], None]:
        name, nbytes, size = running[-1], x.untyped_storage().nbytes(), x.element_size()
        line = _line_that_runs()

        def count(sign: int) -> None:
            by_module[name] += sign * nbytes
            elements[name] += sign * (nbytes // size)
            if line is not None:
                by_line[name][line] += sign * nbytes

        count(1)
        return lambda: count(-1)

    before = running_sums(model)
    saved = SavedBytes({}, {})
    with _following(model, running), noting_saved(note, known):
        yield saved
    for stream, (name, nbytes) in running_sums(model).items():
        if nbytes and stream not in before:
            by_module[name] += nbytes
    saved.by_module.update(by_module)
    saved.elements.update(elements)
    saved.by_line.update({name: dict(lines) for name, lines in by_line.items()})


def _line_that_runs() -> str | None:
    """File, number and text of the line outside of torch and razor that runs; None while an operator of razor does."""
    for frame, number in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if file.startswith(_OPERATORS):
            return None
        if not file.startswith(_PACKAGES) and file != _CONTEXTS:
            return f"{os.path.basename(file)}:{number}: {linecache.getline(file, number).strip()}"
    return None


_RAZOR = os.path.join(os.path.dirname(__file__), "")
_OPERATORS = os.path.join(_RAZOR, "functional", "")
_PACKAGES = (_RAZOR, os.path.join(os.path.dirname(torch.__file__), ""))
_CONTEXTS = contextmanager.__code__.co_filename


@contextmanager
def counting_saved_bytes(model: nn.Module, batch: Any) -> Iterator[list[int]]:
    """Inside this context, a forward of `model` that runs anyhow appends the bytes of each tensor that it saves.

    Args:
        batch: what the model is called with; its tensors are not counted, nor are parameters and buffers.
    """
    sizes: list[int] = []

    def note(x: Tensor) -> Callable[[], None]:
        nbytes = x.untyped_storage().nbytes()
        sizes.append(nbytes)
        return lambda: sizes.remove(nbytes)

    with noting_saved(note, _there_before(model, batch)):
        yield sizes


def _there_before(model: nn.Module, batch: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(batch) if isinstance(x, Tensor))]


@contextmanager
def _following(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are running on the stack `running`."""
    handles = []
    for name, module in model.named_modules():
        if name:
            enter, leave = (lambda *_, name=name: running.append(name)), (lambda *_: running.pop() and None)
            handles.append(module.register_forward_pre_hook(sees_probes(enter)))
            handles.append(module.register_forward_hook(sees_probes(leave), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Training mode inside; mode, buffers and random state of the model's devices as before afterwards.

    In a model that is training already, parts that are not stay as they are: batch norms with fixed statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    numbers = HostRandomState()
    try:
        if not model.training:
            model.train()
        with forked_rng(p.device for p in model.parameters()):
            yield
    finally:
        numbers.restore()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _kind(module: nn.Module) -> str:
    if isinstance(module, RazorModule):
        return module.kind
    return next((operator.kind for operator in OPERATORS if operator.handles(module)), "other")


def _table(title: str, rows: list[ModuleMemory]) -> str:
    names = [row.name or "(model)" for row in rows]
    width = max(map(len, (title, *names)))
    lines = [f"{title:<{width}}  {'dense MiB':>10}  {'razor MiB':>10}  {'factor':>7}  {'bits/element':>12}"]
    for name, row in zip(names, rows, strict=True):
        factor = f"{row.dense_bytes / row.razor_bytes:.1f}x" if row.razor_bytes else "-"
        bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
        sizes = f"{row.dense_bytes / 2**20:>10.2f}  {row.razor_bytes / 2**20:>10.2f}"
        lines.append(f"{name:<{width}}  {sizes}  {factor:>7}  {bits:>12}")
    return "\n".join(lines)
