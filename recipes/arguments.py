"""The command line that the recipes share; each recipe adds what only it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from checkpoints import LAST
from hf_backrazor import RazorConfig
from hf_backrazor.config import PRESETS
from one_line_errors import stop, stop_on_error

DEFAULT_PRESET = "balanced"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text that would bury it."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the arguments)")


def _number(kind: type, least: float, below: float = float("inf")) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < below:
            upper = "" if below == float("inf") else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}{upper}")
        return value

    # argparse names the type in its own message for text that is no number at all.
    parse.__name__ = kind.__name__
    return parse


count = _number(int, 1)
whole = _number(int, 0)
positive = _number(float, 0)
fraction = _number(float, 0, below=1)
nonzero_fraction = _number(float, 0.01, below=1)


def add_shared_arguments(
    parser: argparse.ArgumentParser,
    *,
    output_dir: str,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    weight_decay: float = 0.01,
) -> None:
    """Add the arguments every recipe has, with this recipe's defaults."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", help="Hub id or local folder (default: a model that needs no download)")
    data.add_argument(
        "--dataset",
        help="Hub id, or local file or folder of csv, json, parquet, or a dataset saved to disk "
        "(default: data that need no download)",
    )
    data.add_argument("--dataset_config", help="configuration name, for a Hub dataset that has several")
    data.add_argument("--train_split", default="train")
    data.add_argument("--eval_split", help="default: validation, else test, else a tenth of training")

    data.add_argument("--max_eval_examples", type=count, help="score on this many examples, drawn at random")

    razor = parser.add_argument_group("razor")
    razor.add_argument("--preset", choices=PRESETS, help=f"what is stored for backward (default: {DEFAULT_PRESET})")
    razor.add_argument("--sparsity", type=fraction, help="fraction of a saved activation not kept exactly")
    razor.add_argument(
        "--residual_bits", type=int, choices=(0, 1, 2, 3, 4, 8), help="bits for the rest of a layer's input"
    )
    razor.add_argument("--dense", action="store_true", help="train without the razor, for comparison")

    training = parser.add_argument_group("training")
    training.add_argument("--learning_rate", type=positive, default=learning_rate)
    training.add_argument("--batch_size", type=count, default=batch_size, help="examples a process and step")
    training.add_argument("--eval_batch_size", type=count, default=64)
    training.add_argument("--epochs", type=count, default=epochs)
    training.add_argument("--max_steps", type=count, help="optimizer steps, instead of --epochs")
    training.add_argument("--gradient_accumulation_steps", type=count, default=1)
    training.add_argument("--warmup_ratio", type=fraction, default=0.1, help="share of steps for warm-up")
    training.add_argument("--weight_decay", type=positive, default=weight_decay)
    training.add_argument("--max_grad_norm", type=positive, default=1.0, help="0 turns clipping off")
    training.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: as launched")
    training.add_argument("--seed", type=whole, default=0)
    training.add_argument("--threads", type=count, help="CPU threads a process (default: its share of the cores)")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default=output_dir)
    output.add_argument("--overwrite_output_dir", action="store_true", help="replace a finished run")
    output.add_argument("--checkpointing_steps", type=count, help="write a checkpoint every so many optimizer steps")
    output.add_argument("--checkpoints_total_limit", type=count, help="keep this many checkpoints (default: all)")
    output.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=LAST,
        metavar="CHECKPOINT",
        help="go on from this folder or, without a name or as `last`, from the last checkpoint in --output_dir",
    )
    output.add_argument("--plot", action="store_true", help="also draw loss and memory of every step: training.png")


def razor_config(args: argparse.Namespace) -> RazorConfig | None:
    """The configuration that the arguments ask for, or None for a dense run."""
    changes = {name: value for name in ("sparsity", "residual_bits") if (value := getattr(args, name)) is not None}
    if args.dense:
        if args.preset is not None or changes:
            stop("--dense trains without the razor: leave out --preset, --sparsity and --residual_bits")
        return None
    preset = args.preset or DEFAULT_PRESET
    options = "".join(f" --{name} {value}" for name, value in changes.items())
    with stop_on_error(f"no razor configuration from --preset {preset}{options}"):
        return RazorConfig.preset(preset, **changes)
