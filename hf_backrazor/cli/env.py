"""Print what a bug report should say of the machine and the installed versions."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Names and values; nothing that tells whose machine this is."""
    import torch

    from .. import __version__
    from ..compat import has_integer_products
    from ..kernels.library import available, triton_available

    found: dict[str, Any] = {"hf_backrazor": __version__}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    found |= {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "gpu": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "compiled packing": available(),
        "fast integer products": bool(has_integer_products()),
        "Triton kernels": torch.cuda.is_available() and triton_available(),
        "HF_BACKRAZOR_NATIVE": os.environ.get("HF_BACKRAZOR_NATIVE"),
    }
    return found


def show(data: dict[str, Any]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {key}: {_text(value)}" for key, value in data.items())


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):
        return "unknown"
