"""How far the memory of this process rises: above where it rests while a function runs, and in each training step."""

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not _is_measured(device):
        return None
    peaks = []
    for _ in range(repeats):
        gc.collect()
        _forget_peak(device)
        idle = _in_use(device)
        step()
        peaks.append(_peak(device) - idle)
    return statistics.median(peaks)


class StepPeaks:
    """The high-water mark of memory in each training step, in MiB.

    On CUDA it is what the allocator handed out, on a CPU what is resident in this process, the libraries and what the C
    library keeps of freed tensors included. (glibc keeps little of them, and is slower, where the environment says
    `MALLOC_MMAP_THRESHOLD_=65536`.) Asking takes some 20 microseconds and changes nothing that is computed.

    Attributes:
        at_rest: MiB in use before the first step; None where nothing can be measured.
        peaks: MiB, one number for each step; empty where nothing can be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: list[float] = []
        self.at_rest: float | None = None
        if _is_measured(device):
            _trim()
            self.at_rest = _in_use(device)

    def start_step(self) -> None:
        """Forget the high-water mark of what came before, as of an evaluation."""
        if self.at_rest is not None:
            _forget_peak(self.device)

    def end_step(self) -> None:
        """Note the high-water mark since the step began, and begin the next one."""
        if self.at_rest is not None:
            self.peaks.append(_peak(self.device))
            _forget_peak(self.device)

    def state_dict(self) -> dict[str, list[float]]:
        """The peaks, for a checkpoint."""
        return {"peaks": self.peaks}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on after the peaks of a checkpoint."""
        self.peaks = state["peaks"]

    def summary(self) -> dict[str, str | float | list[float] | None]:
        """The memory part of metrics.json, in MiB; `of` says whose memory it is."""
        return {
            "of": "process" if self.device.type == "cpu" else "device",
            "before_training": self.at_rest,
            "step_peaks": self.peaks,
        }


def _is_measured(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and CLEAR_REFS.exists())


def _in_use(device: torch.device) -> float:
    if device.type == "cpu":
        return _status("VmRSS")
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) / 2**20


def _peak(device: torch.device) -> float:
    if device.type == "cpu":
        return _status("VmHWM")
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def _forget_peak(device: torch.device) -> None:
    if device.type == "cpu":
        CLEAR_REFS.write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _trim() -> None:
    # What was measured before training (a dense step, in the memory report) would be part of every peak.
    gc.collect()
    libc = ctypes.CDLL(None) if STATUS.exists() else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status(key: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return round(int(line.split()[1]) / 1024, 2)
