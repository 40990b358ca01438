"""Two processes on a CPU: data-parallel and sharded razor models, through Accelerate, Trainer and `fully_shard`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_gradients
import distributed_sharding
import distributed_training
import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
Reports = list[dict[str, Any]]


def launch(script: str, folder: Path) -> Reports:
    """What each of the processes reports; all cases of a script run in one launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `--cpu` would start one process, whatever `--num_processes` says; the scripts themselves ask for the CPU.
    arguments = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    arguments += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    result = subprocess.run(
        [*command, str(HERE / script), str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    assert [report["processes"] for report in found] == [2, 2]
    return found


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch("distributed_gradients.py", tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch("distributed_training.py", tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def sharding(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch("distributed_sharding.py", tmp_path_factory.mktemp("sharding"))


# Data parallel


@pytest.mark.parametrize("name", distributed_gradients.MODELS)
@pytest.mark.parametrize("config", distributed_gradients.CONFIGS)
def test_averaged_gradients_are_those_of_one_process(gradients: Reports, name: str, config: str) -> None:
    reports = [report[f"{name}-{config}"] for report in gradients]
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


@pytest.mark.parametrize("name", distributed_training.MODELS)
@pytest.mark.parametrize("preset", distributed_training.ACCUMULATED)
def test_accumulated_gradients_are_those_of_one_batch(training: Reports, name: str, preset: str) -> None:
    for report in (ranks[f"accumulation, {name}, {preset}"] for ranks in training):
        # The first micro-batch stays with its rank; with the second the ranks agree.
        assert report["synchronised"] == [False, True]
        assert report["differed"] == [True, False]
        assert report["difference"] < 1e-9


@pytest.mark.parametrize("name", distributed_training.MODELS)
def test_mixed_precision_is_the_plain_models_and_packs_in_bf16(training: Reports, name: str) -> None:
    for report in (ranks[f"bf16, {name}"] for ranks in training):
        assert report["logits"] == "torch.float32"  # as Accelerate returns what was computed in bf16
        assert report["same_logits"] == [True, True]
        assert report["loss_difference"] < 1e-6  # language models': up to the order of summation
        assert report["gradient_dtypes"] == ["torch.float32"]  # as the weights
        assert report["lossless_cosine"] > 0.9999
        assert report["cosine"] == pytest.approx(report["cosine_in_single"], abs=0.02)
        assert 0 < report["linear_bytes"] <= 0.5 * report["linear_bytes_in_single"]


@pytest.mark.parametrize("preset", distributed_training.RESUMED)
def test_a_saved_state_resumes_bit_for_bit(training: Reports, preset: str) -> None:
    for report in (ranks[f"resuming, {preset}"] for ranks in training):
        assert report["other_weights_before"]
        assert report["loaded"]
        assert report["trained"]
        assert report["resumed"]


@pytest.mark.parametrize("name", distributed_training.TRAINED)
def test_trainer_moves_the_weights_as_it_moves_the_plain_models(training: Reports, name: str) -> None:
    for report in (ranks[f"trainer, {name}"] for ranks in training):
        assert report["processes"] == 2
        assert report["wrapped"] == "DistributedDataParallel"
        assert report["difference"] < 1e-9
        assert not report["differs_between_ranks"]
        assert {"model.safetensors", "razor_config.json", "rng_state_0.pth", "rng_state_1.pth"} <= set(report["files"])


# Sharded


@pytest.mark.parametrize(("name", "how", "config"), distributed_sharding.CASES)
def test_sharded_gradients_are_those_of_one_process(sharding: Reports, name: str, how: str, config: str) -> None:
    for report in (ranks[f"{name}, {how}, {config}"] for ranks in sharding):
        assert report["mean_loss"] == pytest.approx(report["loss"], rel=1e-5)
        # BERT's layers read what the norm of the layer before wrote, and FSDP2 hands it on as another tensor, so that
        # it is packed once more, in other bits.
        apart = 1e-2 if name == "bert" and config == "balanced" else 1e-5
        assert report["difference"] < apart * report["largest"]
        assert report["weights_differ"] < apart
        assert report["cosine"] > 0.999
        assert report["same_keys"]
        assert 0 < report["second_gradient"] < float("inf")


@pytest.mark.parametrize(("name", "how", "config"), distributed_sharding.CASES)
def test_sharding_costs_none_of_what_razor_saves(sharding: Reports, name: str, how: str, config: str) -> None:
    for report in (ranks[f"{name}, {how}, {config}"] for ranks in sharding):
        whole_logits = how == "head, resharded"  # its weight is gone when the loss needs it
        assert report["lazy"] == (name in ("opt", "gpt2", "llama") and not whole_logits)
        if whole_logits:
            assert report["saved"] > report["saved_alone"]
        else:
            assert report["saved"] <= 1.01 * report["saved_alone"]


@pytest.mark.parametrize("asked_for", ["loss", "logits"])
def test_logits_of_a_weight_that_is_gone_are_refused_by_name(sharding: Reports, asked_for: str) -> None:
    for report in sharding:
        assert "the head with 64 outputs" in report["errors"][asked_for]
        assert "`reshard_after_forward`" in report["errors"][asked_for]
