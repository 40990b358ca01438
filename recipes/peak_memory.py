"""How far the memory of this process rises above where it rests while a function runs."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def return_freed_memory() -> None:
    """Have glibc give every freed tensor back at once.

    Otherwise what a step frees stays in the process, the next step's high-water mark is hidden in it, and peaks depend
    on the order of allocations more than on their sizes. Call this before the first tensor is made.
    """
    if STATUS.exists():
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)


def peak_over_idle(step: Callable[[], None], repeats: int = 3) -> float | None:
    """Median over `repeats` of the high-water mark of one `step` less what was there before it, in MiB.

    Call `step` once before, so that what it leaves behind (gradients) is there already. On CUDA the allocator's
    figures are used, elsewhere the kernel's for this process; None where there are neither.
    """
    peaks = []
    for _ in range(repeats):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            idle = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            peaks.append((torch.cuda.max_memory_allocated() - idle) / 2**20)
        elif CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # resets the high-water mark
            idle = _status("VmRSS")
            step()
            peaks.append(_status("VmHWM") - idle)
        else:
            return None
    return statistics.median(peaks)


def _status(key: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
