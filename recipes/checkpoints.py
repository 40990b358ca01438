"""Checkpoints in training, and going on from the last one as if nothing had happened.

`OUTPUT_DIR/checkpoints/step_N` is what `accelerator.save_state` writes after N optimizer steps: weights, optimizer,
random states, and what the recipe registers. It has that name only when all of it is on disk. A run that goes on from
it sees the batches and draws the random numbers that it would have seen and drawn.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from one_line_errors import stop, stop_on_error
from whole_folders import UNFINISHED, flush, flush_names, locked, remove_unfinished

LAST = "last"


@dataclass
class Progress:
    """What a run has done so far, as far as neither its weights nor its optimizer tell. Part of every checkpoint.

    Attributes:
        total_steps: optimizer steps of the whole run.
        batches_per_epoch: batches that each process sees in an epoch.
        processes: number of processes.
        epoch: number of the present epoch, from 0.
        losses: one for each batch of the present epoch.
        step_losses: one for each optimizer step.
        step_seconds: one for each optimizer step.
        history: scores after each epoch.
        seconds: of training, by processes that ended before this one began.
    """

    total_steps: int
    batches_per_epoch: int
    processes: int
    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return len(self.step_losses)

    @property
    def batches(self) -> int:
        """Batches that this process has seen."""
        return self.epoch * self.batches_per_epoch + len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether the last step is done and its weights are scored."""
        return bool(self.history) and self.history[-1]["step"] == self.total_steps

    def end_epoch(self, scores: dict[str, float]) -> None:
        """Note the scores and the mean loss of this epoch, and begin the next one."""
        train_loss = sum(self.losses) / len(self.losses)
        # Plain numbers: checkpoints are read without unpickling anything else.
        scores = {name: float(score) for name, score in scores.items()}
        self.history.append({"step": self.steps, "train_loss": train_loss, **scores})
        self.epoch += 1
        self.losses = []

    def seconds_so_far(self) -> float:
        """Seconds of training, in this process and in those before it."""
        return self.seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """All of it, for Accelerate to save."""
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**state, "seconds": self.seconds_so_far()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint says.

        Raises:
            ValueError: it is of a run with other steps, batches or processes, so that this one cannot go on from it.
        """
        for name in ("total_steps", "batches_per_epoch", "processes"):
            if state[name] != getattr(self, name):
                what = name.replace("_", " ")
                raise ValueError(f"it is of a run of {state[name]} {what}, and this one is of {getattr(self, name)}")
        for name, value in state.items():
            setattr(self, name, value)
        self._started = time.perf_counter()


def chosen_checkpoint(output_dir: str, resume_from: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, or None for a start from the beginning.

    Stops when there is no such checkpoint, and when later ones are in the output folder: the next `last` would mistake
    them for this run's. With `overwrite`, `begin` removes them.
    """
    found = _checkpoints(_folder(output_dir))
    checkpoint = None
    if resume_from == LAST:
        # None yet: the run was killed early. The same command starts it and goes on with it.
        checkpoint = found[-1] if found else None
    elif resume_from is not None:
        checkpoint = Path(resume_from)
        if _step(checkpoint) is None or not checkpoint.is_dir():
            stop(
                f"--resume_from_checkpoint {resume_from} is no checkpoint: name a folder step_N, or leave the name out"
            )
    if not overwrite and (later := _later(found, checkpoint)):
        stop(
            f"{output_dir} holds checkpoints of a run that got to {later[-1].name}: go on from it with "
            "--resume_from_checkpoint, choose another --output_dir or pass --overwrite_output_dir"
        )
    return checkpoint


def begin(accelerator: Accelerator, output_dir: str, checkpoint: Path | None) -> None:
    """Load the checkpoint, if there is one, into what `accelerator` has prepared and registered.

    Removes later checkpoints, which `chosen_checkpoint` let pass, and what dead runs left unfinished.
    """
    folder = _folder(output_dir)
    if accelerator.is_main_process and folder.exists():
        with locked(folder, wait=False) as alone:
            if alone:
                for later in _later(_checkpoints(folder), checkpoint):
                    _remove(later)
                remove_unfinished(folder)
    if checkpoint is not None:
        with stop_on_error(f"cannot go on from {checkpoint}"):
            accelerator.load_state(str(checkpoint))
    accelerator.wait_for_everyone()


def batches_left(accelerator: Accelerator, loader: DataLoader, done: Progress) -> Iterable[Any]:
    """The batches of the present epoch that are not done: all of them, unless the run goes on within the epoch."""
    if done.steps == done.total_steps:
        return ()
    # The epoch decides the order, and an epoch that was gone on within did not count itself.
    loader.set_epoch(done.epoch)
    return accelerator.skip_first_batches(loader, len(done.losses)) if done.losses else loader


def save_checkpoint(accelerator: Accelerator, output_dir: str, step: int) -> None:
    """Write `checkpoints/step_<step>`, and only then remove the oldest above the project's `total_limit`.

    Every process calls this.
    """
    folder = _folder(output_dir)
    unfinished = folder / f"{UNFINISHED}step_{step}"
    main = accelerator.is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if main else nullcontext():
        if main:
            remove_unfinished(folder)
            unfinished.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if main:
            flush(unfinished)
            os.replace(unfinished, folder / f"step_{step}")
            flush_names(folder)
            limit = accelerator.project_configuration.total_limit
            for old in _checkpoints(folder)[:-limit] if limit else ():
                _remove(old)


def _folder(output_dir: str) -> Path:
    return Path(output_dir) / "checkpoints"


def _step(checkpoint: Path) -> int | None:
    name = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(name[1]) if name else None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder, the oldest first."""
    inner = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in inner if _step(path) is not None), key=_step)


def _later(found: list[Path], checkpoint: Path | None) -> list[Path]:
    return [path for path in found if checkpoint is None or _step(path) > _step(checkpoint)]


def _remove(checkpoint: Path) -> None:
    # Renamed first: what is half removed must not pass for a checkpoint.
    dead = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}")
    os.replace(checkpoint, dead)
    shutil.rmtree(dead)
