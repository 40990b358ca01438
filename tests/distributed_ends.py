"""Start two processes that train with DistributedDataParallel and end, many times, and count those that do not end.

    python tests/distributed_ends.py --runs 50

A process that is still there after five minutes is counted as hung, and says where. Each of the two starts and ends a
process group several times. Its last work is to gather predictions, as in the recipes, and Python hands over its lock
to other threads only where it waits.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROCESSES = 2
GROUPS = 3
LIMIT = 300


def work(store: str) -> None:
    """What one process does with one process group: two steps of training, and predictions."""
    import torch
    from torch import distributed, nn

    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sys.setswitchinterval(1000)
    with torch.no_grad():
        predictions = model(torch.randn(2, 8))
    distributed.all_gather([torch.empty_like(predictions) for _ in range(PROCESSES)], predictions)


def count_ends(runs: int) -> dict[str, Any]:
    """How many processes of `runs` starts of two hung or failed, and what they said."""
    found: dict[str, Any] = {"hung": 0, "failed": 0, "output": ""}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            started = []
            for rank in range(PROCESSES):
                environment = {**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
                command = [sys.executable, __file__, "--work", folder]
                started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
            deadline = time.monotonic() + LIMIT
            for process in started:
                try:
                    _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                    found["failed"] += process.returncode != 0
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGABRT)
                    _, said = process.communicate()
                    found["hung"] += 1
                if process.returncode != 0:
                    found["output"] += said[-3000:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--work", metavar="FOLDER", help="be one of the processes, which meet in this folder")
    args = parser.parse_args()
    if args.work:
        faulthandler.enable()
        sys.path.append(str(Path(__file__).parents[1] / "recipes"))
        from process_groups import process_group_outlives_models

        for group in range(GROUPS):
            process_group_outlives_models()(work)(f"{args.work}/{group}")
        return
    started = time.monotonic()
    found = count_ends(args.runs)
    print(found["output"], end="", file=sys.stderr)
    print(
        f"{args.runs} starts of {PROCESSES} processes with {GROUPS} groups in {time.monotonic() - started:.0f} s: "
        f"{found['hung']} hung, {found['failed']} failed"
    )


if __name__ == "__main__":
    main()
