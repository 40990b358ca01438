"""Drop what a failure does not need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from .program import SETTINGS, Block, Program, Statement


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 400) -> Program:
    """A smaller program for which `fails` still holds.

    Args:
        program: one for which it holds.
        fails: the property; raises for programs that make no sense, which is taken as false.
        tries: how many programs to look at.
    """
    budget = itertools.count()
    improved = True
    while improved:
        improved = False
        for smaller in _smaller(program):
            if next(budget) >= tries:
                return program
            try:
                improved = fails(smaller)
            except Exception:
                improved = False
            if improved:
                program = smaller
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with a little less in them, the boldest first."""
    for name, value in (("after", ()), ("before", ()), ("unload", False), ("procedure", "plain")):
        if getattr(program, name) != value:
            yield replace(program, **{name: value})
    for name in ("before", "after"):
        lines = getattr(program, name)
        for i in range(len(lines)):
            if len(lines) > 1:
                yield replace(program, **{name: lines[:i] + lines[i + 1 :]})
    if program.block is not None:
        yield from (replace(program, block=block, x=x or program.x) for block, x in _less_of_program(program))
        plain = ("y = model(x)", 'record("output", y)', "loss = weighted_sum(y)")
        if program.compute != plain:
            yield replace(program, compute=plain)
    if program.setting != "lossless" and SETTINGS[program.setting].dtype == "float64":
        yield replace(program, setting="lossless")
    if not program.needs_grad and "DTYPE" in program.x:
        yield replace(program, needs_grad=True)


def _less_of_program(program: Program) -> Iterator[tuple[Block, str | None]]:
    block = program.block
    statements = block.statements
    for i in range(1, len(statements)):  # begin later
        shape = statements[i].shape
        if shape and "randint" not in program.x:
            yield replace(block, statements=statements[i:]), f"torch.randn({shape}, dtype=DTYPE)"
        elif shape:
            first = Statement(
                "Embedding", "x = self.e0(x)", f"self.e0 = nn.Embedding(11, {shape[-1]})", shape=shape[:-1]
            )
            if i > 1:
                yield replace(block, statements=(first, *statements[i:])), f"torch.randint(11, {shape[:-1]})"
    for less in _less(block):
        yield less, None


def _less(block: Block) -> Iterator[Block]:
    statements = block.statements
    for i in range(len(statements) - 1, 0, -1):  # end earlier
        yield replace(block, statements=statements[:-i])
    for length in (4, 3, 2, 1):
        for i in range(len(statements) - length + 1):
            if len(statements) > length:
                yield replace(block, statements=statements[:i] + statements[i + length :])
    for i, statement in enumerate(statements):
        if statement.block is None:
            continue
        for changed in (
            *statement.block.statements,  # the inner statements in place of the block: one of them, ...
        ):
            yield replace(block, statements=(*statements[:i], changed, *statements[i + 1 :]))
        yield replace(block, statements=(*statements[:i], *statement.block.statements, *statements[i + 1 :]))
        name = statement.init.split()[0].removeprefix("self.")
        plain = f"x = self.{name}(x)"
        if statement.run != plain:
            yield replace(block, statements=(*statements[:i], replace(statement, run=plain), *statements[i + 1 :]))
        for less in _less(statement.block):
            yield replace(block, statements=(*statements[:i], replace(statement, block=less), *statements[i + 1 :]))
