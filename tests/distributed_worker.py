"""How each of several processes that a test starts begins and ends."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from process_groups import process_group_outlives_models

# Below the time that test_distributed.py gives a launch.
LIMIT = 240


def run_worker(main: Callable[[Path], None]) -> None:
    """Call `main` with the folder of the command line, and end the process group that it started.

    A process that hangs says where, in each of its threads, and ends.
    """
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    process_group_outlives_models()(main)(Path(sys.argv[1]))
