"""Random programs, dense and with razor; see `random_programs`."""

from __future__ import annotations

import importlib

import pytest
import torch
from random_programs.compare import differences
from random_programs.generate import draw_program
from random_programs.many import Outcome, look_at
from random_programs.program import SETTINGS
from random_programs.run import NothingToReplace
from torch import nn

from hf_backrazor import RazorConfig

SEEDS = range(300)
PER_TEST = 50


def unchanged(model: nn.Module, config: RazorConfig) -> nn.Module:
    """In place of razor: nothing."""
    return model


@pytest.mark.parametrize("first", SEEDS[::PER_TEST])
def test_razor_trains_as_dense(first: int) -> None:
    outcomes = [look_at(seed, shrinks=False) for seed in range(first, first + PER_TEST)]
    failed = [outcome for outcome in outcomes if outcome.first is not None]
    # One program each, and where it differs; `python -m tests.random_programs --seed N` makes it smaller.
    assert not failed, "\n\n".join(map(_told, failed[:3]))
    assert sum(outcome.replaced for outcome in outcomes) > 0.7 * PER_TEST
    assert sum("raises" in outcome.features for outcome in outcomes) < 0.2 * PER_TEST


def _told(outcome: Outcome) -> str:
    return f"seed {outcome.seed}: {outcome.first}\n{outcome.script}"


def test_dense_differs_from_dense_nowhere() -> None:
    assert {seed: found for seed in range(1000, 1100) if (found := differences(draw_program(seed), unchanged))} == {}


@pytest.mark.parametrize("operator", ["linear", "convolution"])
def test_a_weight_gradient_that_is_wrong_by_a_hundredth_is_found(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"hf_backrazor.functional.{operator}")
    right = module._grad_weight
    monkeypatch.setattr(module, "_grad_weight", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    found = []
    for seed in range(1000, 1060):
        try:
            found += differences(draw_program(seed, "lossless"))
        except NothingToReplace:
            continue
    assert sum("gradient" in difference.kind for difference in found) >= 3


def test_programs_are_the_same_each_time_and_can_be_read() -> None:
    for seed in range(20):
        program = draw_program(seed)
        assert program.script() == draw_program(seed).script()
        compile(program.script(), f"<program {seed}>", "exec")


def test_every_setting_and_most_of_the_grammar_is_drawn() -> None:
    features = set().union(*(draw_program(seed).features for seed in range(150)))
    assert {f"setting: {name}" for name in SETTINGS} <= features
    assert len(features) > 180


def test_a_program_runs_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    seed = next(
        s for s in range(2000, 2100) if (p := draw_program(s)).needs_grad and p.procedure == "plain" and p.block
    )
    script = draw_program(seed, "lossless").script().replace("tests.random_programs", "random_programs")
    exec(compile(script, "<program>", "exec"), {"__name__": "program"})
    assert "x tensor(" in capsys.readouterr().out
    assert torch.is_grad_enabled()
