"""A pytest plugin that runs PEFT's own test suite on razor models.

Everything that `peft.get_peft_model` returns goes through `get_razor_model` with a preset, so that what PEFT promises
of its models (saving and loading, merging, switching and deleting adapters, training what is to be trained) is checked
of razor models as well. PEFT's source distribution holds the tests of its release, but for two files of its repository,
`tests/__init__.py` and `tests/conftest.py`. Beside the packages of `hf_backrazor[test]` they need `diffusers` and
`parameterized`. From the folder that holds PEFT's `tests`:

    export PYTHONPATH=<hf_backrazor>:<hf_backrazor>/tests HF_HUB_OFFLINE=1 HF_HOME=<an empty folder>
    python <hf_backrazor>/tests/peft_models.py
    python -m pytest -c /dev/null --rootdir . -p peft_suite --razor-preset none -n 2 -q tests/test_custom_models.py
    python -m pytest -c /dev/null --rootdir . -p peft_suite --razor-preset lossless -n 2 -q tests/test_custom_models.py

The second run should fail nothing that the first does not. `peft_models.py` writes models in the place of those that
many of the tests read from the Hub; tests that read other models, adapters or data sets fail both times. `--one-in 10`
runs a tenth of the tests, the same ones each time.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections import defaultdict
from typing import Any

import peft
import pytest
from torch import nn

from hf_backrazor import RazorConfig, RazorModel, get_razor_model
from hf_backrazor.config import PRESETS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    parser.addoption("--razor-preset", choices=["none", *PRESETS], default="lossless", help="preset of the models")
    parser.addoption("--one-in", type=int, default=1, help="run one of so many tests")


def pytest_configure(config: pytest.Config) -> None:
    """Replace `get_peft_model` wherever it was imported; tests are imported later."""
    preset = config.getoption("--razor-preset")
    if preset == "none":
        return
    plain = peft.get_peft_model
    wrapped = _with_razor(plain, preset)
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "peft"]:
        if vars(module).get("get_peft_model") is plain:
            module.get_peft_model = wrapped


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select tests by their names, the same in each process."""
    one_in = config.getoption("--one-in")
    kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % one_in == 0]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    # Their context manager is online where a model is asked for the first time.
    for module in [module for name, module in sys.modules.items() if name.endswith("testing_utils")]:
        if isinstance(vars(module).get("_HUB_MODEL_ACCESSES"), dict):
            module._HUB_MODEL_ACCESSES = _Everything(int)


class _Everything(defaultdict):
    """All models were asked for already."""

    def __contains__(self, key: object) -> bool:
        return True


def _with_razor(get_peft_model: Any, preset: str) -> Any:
    @functools.wraps(get_peft_model)
    def wrapped(*args: Any, **kwargs: Any) -> nn.Module:
        model = get_peft_model(*args, **kwargs)
        if any(isinstance(module, RazorModel) for module in model.modules()):
            return model  # adapters of a model that was one before: `unload` leaves it one
        try:
            return get_razor_model(model, RazorConfig.preset(preset))
        except ValueError as error:
            if not str(error).startswith("nothing to replace"):
                raise
            return model

    return wrapped
