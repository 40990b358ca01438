"""`--plot`: pictures of the loss and the memory of every training step, of one run or of several side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import DEFAULT_PRESET
from one_line_errors import stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT = "training.png"
WIDTH, HEIGHT, DPI = 8.0, 6.0, 120  # inches, inches, pixels an inch
# The mean runs over this share of the steps: batches differ too much for single losses to show where they go.
SMOOTHED = 0.05
FAINT, STRONG, QUIET = "#a8c4e0", "#1f5a99", "#666666"
# Dashes as well as colours, as curves that agree lie on top of each other.
LINES = ["-", "--", "-.", ":"]


def check_plot(wanted: bool, argument: str = "--plot") -> None:
    """Stop when a plot is wanted and matplotlib is not installed: before training, not after."""
    if wanted and find_spec("matplotlib") is None:
        stop(f"{argument} draws with matplotlib: pip install matplotlib")


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and those around it, `window` in all; of fewer at both ends."""
    before, after = window // 2, window - window // 2
    around = (values[max(0, index - before) : index + after] for index in range(len(values)))
    return [sum(part) / len(part) for part in around]


def save_training_plot(folder: str, *, task: str, default_model: str, metrics: dict[str, Any]) -> None:
    """Draw what `metrics` says of the run, and write it to `training.png` in the folder.

    Args:
        folder: where to write.
        task: what the recipe trains for, for the title.
        default_model: what the recipe trains when no `--model` is named.
        metrics: what goes into `metrics.json`.
    """
    from matplotlib.ticker import MaxNLocator

    figure, loss_panel, memory_panel = _panels(f"{task}: {run_settings(metrics['arguments'], default_model)}")

    losses, steps = metrics["step_losses"], range(1, len(metrics["step_losses"]) + 1)
    window = round(SMOOTHED * len(losses))
    marker = "." if len(losses) < 30 else None
    if window > 1:
        loss_panel.plot(steps, losses, color=FAINT, linewidth=1, label="each step")
        loss_panel.plot(steps, running_mean(losses, window), color=STRONG, label=f"mean of {window} steps")
        loss_panel.legend(loc="upper right", frameon=False)
    else:
        loss_panel.plot(steps, losses, color=STRONG, marker=marker)
    loss_panel.set_ylabel("training loss")
    loss_panel.set_title(_scores(metrics["history"][-1]), fontsize=10, color=QUIET, loc="left")

    peaks, at_rest = metrics["memory_mib"]["step_peaks"], metrics["memory_mib"]["before_training"]
    if peaks:
        memory_panel.plot(steps, peaks, color=STRONG, marker=marker, label="peak of each step")
        memory_panel.axhline(at_rest, color=QUIET, linestyle="--", linewidth=1, label="before the first step")
        # Room above the curve for the legend.
        memory_panel.set_ylim(0, 1.3 * max(peaks))
        memory_panel.legend(loc="upper right", frameon=False, ncols=2)
    else:
        memory_panel.text(0.5, 0.5, "not measured on this system", ha="center", transform=memory_panel.transAxes)
    memory_panel.set_ylabel(f"memory of the {metrics['memory_mib']['of']} (MiB)")
    memory_panel.set_xlabel("optimizer step")
    memory_panel.set_title(_saved(metrics["saved_bytes"]), fontsize=10, color=QUIET, loc="left")
    memory_panel.xaxis.set_major_locator(MaxNLocator(integer=True))

    figure.savefig(Path(folder) / PLOT)


def save_comparison_plot(path: str | Path, *, title: str, runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Draw the losses and peaks of several variants' runs in one picture.

    Args:
        path: of the picture; its suffix says of which kind (png, svg, pdf).
        title: above it.
        runs: the variants' names, and what `metrics.json` says of the runs of each, one for each seed. Losses are the
            seeds' mean.
    """
    figure, loss_panel, memory_panel = _panels(title)
    for index, (variant, seeds) in enumerate(runs.items()):
        style = {"color": f"C{index}", "linestyle": LINES[index % len(LINES)]}
        losses = [statistics.mean(step) for step in zip(*(run["step_losses"] for run in seeds), strict=True)]
        smooth = running_mean(losses, max(1, round(SMOOTHED * len(losses))))
        loss_panel.plot(range(1, len(losses) + 1), smooth, label=variant, **style)
        memory = seeds[0]["memory_mib"]
        if memory["step_peaks"]:
            above = [peak - memory["before_training"] for peak in memory["step_peaks"]]
            memory_panel.plot(range(1, len(above) + 1), above, label=variant, **style)
    loss_panel.set_ylabel("training loss")
    loss_panel.legend(loc="upper right", frameon=False)
    memory_panel.set_ylabel("peak of each step (MiB)")
    memory_panel.set_title(
        "above what was there before training; gradients and the optimizer's state are in it",
        fontsize=10,
        color=QUIET,
        loc="left",
    )
    memory_panel.set_ylim(bottom=0)
    memory_panel.set_xlabel("optimizer step")
    figure.savefig(path)


def _panels(title: str) -> tuple[Figure, Axes, Axes]:
    """A figure with a panel for the loss and one for the memory below it."""
    # Here and not above: only this needs matplotlib. Not pyplot, which keeps figures and picks a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    loss_panel, memory_panel = figure.subplots(2, 1, sharex=True)
    # Names of models and folders are no formulas, whatever dollar signs they hold.
    figure.suptitle(title, fontsize=12, parse_math=False)
    for panel in (loss_panel, memory_panel):
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, loss_panel, memory_panel


def run_settings(arguments: dict[str, Any], default_model: str) -> str:
    """Which model was trained, and how: for titles."""
    model = model_name(arguments, default_model)
    if arguments["dense"]:
        return f"{model}, dense"
    sparsity = "" if arguments["sparsity"] is None else f", sparsity {arguments['sparsity']:g}"
    return f"{model}, razor ({arguments['preset'] or DEFAULT_PRESET}{sparsity})"


def model_name(arguments: dict[str, Any], default_model: str) -> str:
    """The model's Hub id, or the name of its folder."""
    model = arguments["model"] or default_model
    return Path(model).resolve().name if Path(model).is_dir() else model


def _scores(last: dict[str, float]) -> str:
    scores = {name: value for name, value in last.items() if name not in ("step", "train_loss")}
    return f"after {last['step']} steps: " + ", ".join(
        f"{name.replace('_', ' ')} {scores[name]:.3f}" for name in scores
    )


def _saved(saved_bytes: dict[str, float | None]) -> str:
    dense, razor, factor = (saved_bytes[key] for key in ("dense", "razor", "factor"))
    text = f"saved for backward by a step: {dense / 2**20:.1f} MiB dense"
    return text if razor is None else f"{text}, {razor / 2**20:.1f} MiB razor ({factor:.1f}x less)"
