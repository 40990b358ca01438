"""Two processes with half of the batch each, against one process with all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_gradients import CONFIGS, MODELS

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes reports; all cases run in one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `--cpu` would start one process, whatever `--num_processes` says; the script itself asks for the CPU.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    result = subprocess.run(
        [*command, str(HERE / "distributed_gradients.py"), str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    assert [report["processes"] for report in found] == [2, 2]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_averaged_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], name: str, config: str) -> None:
    reports = [report[f"{name}-{config}"] for report in ranks]
    assert reports[0]["own_loss"] != reports[1]["own_loss"]  # the halves differ
    for report in reports:
        assert report["wrapped"]
        assert report["razor"]
        assert report["mean_loss"] == pytest.approx(report["loss"], rel=1e-9)
        if config == "tensor":
            assert report["difference"] > 1e-5
        else:
            assert report["difference"] < 1e-9
    assert [report["wrote_config"] for report in reports] == [True, False]
