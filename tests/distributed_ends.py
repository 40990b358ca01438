"""Start two processes that train with DistributedDataParallel and end, many times, and count those that do not end.

    python tests/distributed_ends.py --runs 50

A process that is still there after five minutes is counted as hung, and says
where. Its last work is to gather predictions, as in the recipes, and Python hands over its lock to other threads only
where it waits: so it meets gloo's threads at the worst moment.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROCESSES = 2
LIMIT = 300


def work() -> None:
    """What one process does: two steps of training, and predictions."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    from hf_backrazor import get_razor_model

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = get_razor_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (rows,) in loader:
        accelerator.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    sys.setswitchinterval(1000)
    for (rows,) in loader:
        with torch.no_grad():
            accelerator.gather_for_metrics(model(rows))


def count_ends(runs: int) -> dict[str, Any]:
    """How many processes of `runs` starts of two hung or failed, and what they said."""
    found: dict[str, Any] = {"hung": 0, "failed": 0, "output": ""}
    for _ in range(runs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(PROCESSES):
            environment = {
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            }
            command = [sys.executable, __file__, "--work"]
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
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
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.work:
        faulthandler.enable()
        sys.path.append(str(Path(__file__).parents[1] / "recipes"))
        from process_groups import process_group_outlives_models

        process_group_outlives_models()(work)()
        return
    started = time.monotonic()
    found = count_ends(args.runs)
    print(found["output"], end="", file=sys.stderr)
    print(
        f"{args.runs} starts of {PROCESSES} processes in {time.monotonic() - started:.0f} s: "
        f"{found['hung']} hung, {found['failed']} failed"
    )


if __name__ == "__main__":
    main()
