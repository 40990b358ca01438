"""The folder a run leaves behind, and the table it closes with.

A run is finished when its folder holds `metrics.json`. That file arrives last, and a finished run is replaced only
when the user says so. At every instant the earlier run or the new one is whole on disk. While a run is saved:

1. `.unfinished-*` in the folder is filled, with the new run and with the list of the earlier one's files. If the
   process dies, the next run removes it.
2. It is renamed to `.finished-*`. From here on the new run counts.
3. The earlier run's files are removed and the new ones moved in their place. If the process dies, the next run, or
   `finish_saving`, does the rest.
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
from whole_folders import UNFINISHED, flush, flush_names, locked, remove_unfinished

METRICS = "metrics.json"
FINISHED = ".finished-"
EARLIER = "earlier_files.json"


def check_run_folder(output_dir: str, overwrite: bool) -> None:
    """Stop when the folder holds a finished run or cannot be written to: before training, not after.

    What a run that was killed left unfinished is finished or removed first.
    """
    folder = Path(output_dir)
    # One process of a launch looks after the folder for all.
    if int(os.environ.get("RANK", "0")) != 0:
        return
    with stop_on_error(f"cannot write to --output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        finish_saving(output_dir)
    if (folder / METRICS).exists() and not overwrite:
        stop(f"{folder} holds a finished run: choose another --output_dir or pass --overwrite_output_dir")


def finish_saving(output_dir: str) -> None:
    """Finish what a run was doing that was killed while it was saved; leave alone a run that is being saved."""
    folder = Path(output_dir)
    if folder.is_dir():
        with locked(folder, wait=False) as alone:
            if alone:
                _clear_up(folder)


def save_run(output_dir: str, metrics: dict[str, Any], *savers: Callable[[str], Any]) -> None:
    """Call each saver (`model.save_pretrained`, ...) with one folder and move its files to `output_dir`."""
    folder = Path(output_dir)
    with locked(folder):
        _clear_up(folder)
        # Beside the target and not in /tmp: a rename is atomic only within one file system.
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        # Called as the target is, as model cards take their title from it.
        stage = unfinished / folder.resolve().name
        try:
            stage.mkdir(exist_ok=True)
            for save in savers:
                save(str(stage))
            written = _files(stage)
            (stage / METRICS).write_text(json.dumps({**metrics, "files": written}, indent=2) + "\n", encoding="utf-8")
            for name in (*written, METRICS):
                if (folder / name).is_dir():
                    raise IsADirectoryError(f"{folder / name} is a folder, and a run has a file of that name")
            (unfinished / EARLIER).write_text(json.dumps(_files_of_run(folder)), encoding="utf-8")
            flush(unfinished)
            finished = folder / unfinished.name.replace(UNFINISHED, FINISHED, 1)
            os.replace(unfinished, finished)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _move_in(finished, folder)


def _clear_up(folder: Path) -> None:
    for finished in folder.glob(f"{FINISHED}*"):
        _move_in(finished, folder)
    remove_unfinished(folder)


def _move_in(finished: Path, folder: Path) -> None:
    # May have been begun before, by a process that died: each part can be done twice.
    flush_names(folder)
    stage = next((inner for inner in finished.iterdir() if inner.is_dir()), None)
    # metrics.json is moved last. Without it nothing is left to be moved.
    if stage is not None and (stage / METRICS).exists():
        # And the earlier one goes first, so that a folder of mixed files never passes for a finished run.
        (folder / METRICS).unlink(missing_ok=True)
        new = json.loads((stage / METRICS).read_text(encoding="utf-8"))["files"]
        # Only what the earlier run itself listed: a dense run must not leave its predecessor's razor_config.json
        # beside its model, and nobody's other files are ours to delete.
        for name in json.loads((finished / EARLIER).read_text(encoding="utf-8")):
            if name not in new:
                (folder / name).unlink(missing_ok=True)
        for name in (*_files(stage, but=METRICS), METRICS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
        for touched in {folder, *((folder / name).parent for name in new)}:
            flush_names(touched)
    shutil.rmtree(finished)


def _files(folder: Path, but: str | None = None) -> list[str]:
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name != but)


def _files_of_run(folder: Path) -> list[str]:
    """What the run in `folder` says it wrote, as far as it lies in there."""
    try:
        files = json.loads((folder / METRICS).read_text(encoding="utf-8")).get("files", [])
    except (FileNotFoundError, ValueError, AttributeError):
        return []
    return [name for name in files if (folder / name).resolve().is_relative_to(folder.resolve())]


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
