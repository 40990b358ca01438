"""All cores for training on a CPU."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator


def use_cpu_threads(accelerator: Accelerator, threads: int | None) -> None:
    """Set the number of CPU threads of this process; None: the machine's cores, shared between its processes.

    `accelerate launch` leaves a process with one thread unless it is called with `--cpu`.
    """
    if threads is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else None
    if accelerator.device.type == "cpu" and threads is not None:
        torch.set_num_threads(threads)
