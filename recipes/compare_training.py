"""Fine-tune the same model dense and with razor, with several seeds, and put scores and loss curves side by side.

    python recipes/compare_training.py

runs the text recipe (MiniLM-L6 on docstrings, no download) for each variant and seed and prints a table. Every run is
the recipe's own command line, with what stands after `--` added to it, so the hyperparameters are the same for all:

    python recipes/compare_training.py --recipe image_classification.py --output_dir runs/images -- \
        --model FOLDER --dataset FOLDER --learning_rate 5e-5 --max_steps 100
    python recipes/compare_training.py --recipe semantic_segmentation.py --score mean_iou \
        --variants dense balanced "paper 0.7" --output_dir runs/segmentation

Runs that are finished are not run again: an interrupted comparison goes on where it was. `--plot FILE` draws loss and
memory of all variants in one picture.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run_folder import finish_saving
from training_plot import check_plot, model_name, save_comparison_plot

VARIANTS = {
    "dense": ["--dense"],
    "checkpointing": ["--dense", "--gradient_checkpointing"],  # language_modeling.py only
    "paper 0.7": ["--preset", "paper", "--sparsity", "0.7"],
    "paper 0.8": ["--preset", "paper", "--sparsity", "0.8"],
    "paper 0.9": ["--preset", "paper", "--sparsity", "0.9"],
    "balanced": ["--preset", "balanced"],
    "balanced 4 bits": ["--preset", "balanced", "--residual_bits", "4"],
    "fast": ["--preset", "fast"],
    "compact": ["--preset", "compact"],
}
DEFAULT_VARIANTS = ["dense", "paper 0.8", "paper 0.9", "balanced"]
PARTS_OF_CURVE = 6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="text_classification.py", help="a recipe of this folder")
    parser.add_argument("--score", default="accuracy", help="of those in the recipe's metrics.json")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare_training"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; they share the CPU's cores")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw loss and memory of each step")
    parser.add_argument("rest", nargs="*", metavar="-- ARGUMENTS", help="given to the recipe")
    return parser.parse_args()


def train(args: argparse.Namespace, variant: str, seed: int) -> dict:
    """Run the recipe, unless that was done already, and return its metrics."""
    folder = args.output_dir / f"{variant.replace(' ', '-')}-seed-{seed}"
    finish_saving(str(folder))
    finished = folder / "metrics.json"
    if not finished.exists():
        threads = max(1, (os.cpu_count() or 1) // args.parallel)
        command = [sys.executable, str(Path(__file__).parent / args.recipe), "--output_dir", str(folder)]
        command += ["--seed", str(seed), "--threads", str(threads), *VARIANTS[variant], *args.rest]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        print("+", *command[1:], file=sys.stderr, flush=True)
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"{variant}, seed {seed} failed:\n{run.stderr[-2000:]}")
    metrics = json.loads(finished.read_text(encoding="utf-8"))
    if args.score not in metrics:
        scores = [name for name in metrics["history"][-1] if name not in ("step", "train_loss")]
        raise SystemExit(f"--score {args.score}: {args.recipe} has no such score, only {', '.join(scores)}")
    return metrics


def row(variant: str, runs: list[dict], score: str) -> str:
    """One line of the table: the score, with its spread over the seeds, and the mean training loss along the run."""
    values = [run[score] for run in runs]
    spread = statistics.stdev(values) if len(runs) > 1 else 0.0
    steps = len(runs[0]["step_losses"])
    curve = []
    for part in range(PARTS_OF_CURVE):
        first, last = part * steps // PARTS_OF_CURVE, (part + 1) * steps // PARTS_OF_CURVE
        curve.append(statistics.mean(loss for run in runs for loss in run["step_losses"][first:last]))
    each = ", ".join(f"{value:.3f}" for value in values)
    losses = " ".join(f"{loss:.3f}" for loss in curve)
    return f"| {variant} | {statistics.mean(values):.3f} ± {spread:.3f} | {each} | {losses} |"


def main() -> None:
    args = parse_arguments()
    check_plot(args.plot is not None)
    jobs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = dict(zip(jobs, pool.map(lambda job: train(args, *job), jobs), strict=True))
    name = args.score.replace("_", " ")
    print(f"| | {name} | by seed | mean training loss in each of {PARTS_OF_CURVE} parts of the run |")
    print("|---|---|---|---|")
    runs = {variant: [results[variant, seed] for seed in args.seeds] for variant in args.variants}
    for variant, seeds in runs.items():
        print(row(variant, seeds, args.score))
    if args.plot is not None:
        recipe = Path(args.recipe).stem.replace("_", " ")
        first = runs[args.variants[0]][0]["arguments"]
        save_comparison_plot(args.plot, title=f"{recipe}, {model_name(first, 'the default model')}", runs=runs)


if __name__ == "__main__":
    main()
