"""The folder a run leaves behind, and the table it closes with.

A run is finished when its folder holds `metrics.json`. That file arrives last, every file arrives whole, and
a finished run is replaced only when the user says so.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from one_line_errors import stop, stop_on_error

METRICS = "metrics.json"


def check_run_folder(output_dir: str, overwrite: bool) -> None:
    """Stop when the folder holds a finished run or cannot be written to: before training, not after."""
    folder = Path(output_dir)
    if (folder / METRICS).exists() and not overwrite:
        stop(f"{folder} holds a finished run: choose another --output_dir or pass --overwrite_output_dir")
    with stop_on_error(f"cannot write to --output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def save_run(output_dir: str, metrics: dict[str, Any], *savers: Callable[[str], Any]) -> None:
    """Call each saver (`model.save_pretrained`, ...) with one folder and move its files to `output_dir`."""
    folder = Path(output_dir)
    # Beside the target and not in /tmp: a rename is atomic only within one file system.
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    # Called as the target is, as model cards take their title from it.
    stage = unfinished / folder.resolve().name
    try:
        stage.mkdir(exist_ok=True)
        for save in savers:
            save(str(stage))
        written = sorted(file.relative_to(stage).as_posix() for file in stage.rglob("*") if file.is_file())
        (stage / METRICS).write_text(json.dumps({**metrics, "files": written}, indent=2) + "\n", encoding="utf-8")
        _remove_earlier_run(folder)
        for name in (*written, METRICS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_earlier_run(folder: Path) -> None:
    # Only what the earlier run itself listed: a dense run must not leave its predecessor's razor_config.json
    # beside its model, and nobody's other files are ours to delete. The metrics.json goes first, so that a
    # folder of mixed files never passes for a finished run.
    earlier = folder / METRICS
    if not earlier.exists():
        return
    try:
        files = json.loads(earlier.read_text(encoding="utf-8")).get("files", [])
    except (ValueError, AttributeError):
        files = []
    earlier.unlink()
    for name in files:
        if (folder / name).resolve().is_relative_to(folder.resolve()):
            (folder / name).unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on, for metrics.json."""
    found = {}
    for library in ("hf_backrazor", "torch", "transformers", "accelerate", "datasets"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            # A source checkout on PYTHONPATH has no metadata.
            found[library] = "source"
    return found


def median_step_seconds(step_seconds: list[float]) -> float:
    """The median over all steps but the first, which also pays for warming up."""
    return statistics.median(step_seconds[1:] or step_seconds)


def saved_bytes_summary(dense_bytes: int, razor_bytes: int | None) -> dict[str, float | None]:
    """The memory part of metrics.json; a dense run has no razor bytes."""
    factor = dense_bytes / razor_bytes if razor_bytes else None
    return {"dense": dense_bytes, "razor": razor_bytes, "factor": factor}


def closing_table(scores: dict[str, float], saved_bytes: dict[str, float | None], step_seconds: float) -> str:
    """Scores, saved bytes and step time, one to a line."""

    def mebibytes(key: str) -> str:
        return "not used" if saved_bytes[key] is None else f"{saved_bytes[key] / 2**20:.1f} MiB"

    factor = saved_bytes["factor"]
    rows = [(name.replace("_", " "), f"{value:.4f}") for name, value in scores.items()]
    if "full_fine_tuning" in saved_bytes:
        rows.append(("saved activations, all weights trained", mebibytes("full_fine_tuning")))
    rows += [
        ("saved activations, dense", mebibytes("dense")),
        ("saved activations, razor", mebibytes("razor") + (f" ({factor:.1f}x less)" if factor else "")),
        ("median step", f"{1000 * step_seconds:.0f} ms"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
