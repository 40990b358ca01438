"""The command `hf-backrazor`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import hf_backrazor
from hf_backrazor import RazorConfig, estimate_saved_bytes, estimate_step_memory, get_razor_model
from hf_backrazor.cli import main
from hf_backrazor.cli.text import parse_bytes, table
from hf_backrazor.cli.variants import LADDER

BERT = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 99}
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 10}
COARSE = ("coarser than balanced", "coarsest")
COMPACT = ("compact", "compact, 2 bits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's configuration; its weights are never needed."""
    path = tmp_path_factory.mktemp("model")
    config = BertConfig(**BERT, architectures=["BertForSequenceClassification"])
    config.save_pretrained(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def data(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return json.loads(run(capsys, *arguments, "--json"))


def test_env_says_what_a_bug_report_needs(capsys) -> None:
    found = data(capsys, "env")
    assert found["hf_backrazor"] == hf_backrazor.__version__
    assert found["torch"] == torch.__version__
    text = run(capsys, "env")
    assert all(line.startswith("- ") for line in text.splitlines())
    assert f"- threads: {torch.get_num_threads()}\n" in text
    assert str(Path.home()) not in text


def test_report_is_what_the_library_estimates(capsys, folder: Path) -> None:
    found = data(capsys, "report", folder, "--batch", 4, "--sequence", 32)
    dense = BertForSequenceClassification(BertConfig(**BERT)).train()
    assert found["class"] == "BertForSequenceClassification"
    assert found["variants"]["dense"]["saved"] == estimate_saved_bytes(dense, (4, 32)).total
    razor = get_razor_model(dense, RazorConfig())
    row = found["variants"]["razor, balanced"]
    assert row["saved"] == estimate_saved_bytes(razor, (4, 32)).total
    # Of a process, the first estimate also sees constants that are made once.
    assert row["total"] == pytest.approx(estimate_step_memory(razor, (4, 32)).total, rel=2e-3)
    assert row["total"] == row["weights"] + row["optimizer"] + row["step"]


def test_nothing_is_computed_while_the_library_is_imported_on_the_meta_device() -> None:
    # As `report` and `plan` do where nothing else has imported it.
    code = "import torch\nwith torch.device('meta'):\n    import hf_backrazor.model"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report_shows_every_variant_in_a_table(capsys, folder: Path) -> None:
    text = run(capsys, "report", folder, "--batch", 4, "--sequence", 32)
    assert "a batch of 4 x 32 tokens, float32" in text
    for name in ("dense", "activation checkpointing", "razor, paper 0.9", "razor, fast"):
        assert any(line.startswith(name) for line in text.splitlines())
    assert "1.0x" in text


def test_a_model_type_stands_for_its_default_configuration(capsys, monkeypatch) -> None:
    from hf_backrazor.cli import report

    monkeypatch.setattr(report, "VARIANTS", {"dense": report.VARIANTS["dense"]})
    found = data(capsys, "report", "vit", "--batch", 2, "--image", 64, "--dtype", "bfloat16")
    assert found["class"] == "ViTForImageClassification"
    assert found["inputs"] == "images of 64x64"
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(image_size=64)).bfloat16().train()
    assert found["variants"]["dense"]["saved"] == estimate_saved_bytes(model, (2, 3, 64, 64)).total


@pytest.mark.parametrize(
    ("task", "name"), [("masked-lm", "BertForMaskedLM"), ("question-answering", "BertForQuestion")]
)
def test_tasks_choose_the_class(capsys, folder: Path, monkeypatch, task: str, name: str) -> None:
    from hf_backrazor.cli import report

    monkeypatch.setattr(report, "VARIANTS", {"dense": report.VARIANTS["dense"]})
    found = data(capsys, "report", folder, "--task", task, "--sequence", 16)
    assert found["class"].startswith(name)
    assert found["variants"]["dense"]["step"] > found["variants"]["dense"]["saved"] > 0


def test_the_largest_batch_fits_and_one_more_does_not(capsys, folder: Path) -> None:
    def total(batch: int) -> int:
        return estimate_step_memory(BertForSequenceClassification(BertConfig(**BERT)).train(), (batch, 64)).total

    memory = total(11) + 1000
    row = data(capsys, "plan", folder, "--sequence", 64, "--memory", memory)["variants"]["dense"]
    assert row == {"batch": 11, "total": total(11)}
    # Beyond what is measured: from a straight line, which has to be right to one in a hundred.
    large = data(capsys, "plan", folder, "--sequence", 64, "--memory", total(100))["variants"]["dense"]
    assert large["batch"] == pytest.approx(100, rel=0.01)
    nothing = data(capsys, "plan", folder, "--memory", "1MB")["variants"]
    assert {row["batch"] for row in nothing.values()} == {0}


def test_plan_finds_the_first_settings_that_fit(capsys, folder: Path) -> None:
    everything = data(capsys, "plan", folder, "--batch", 64, "--memory", "1TiB")["settings"]
    assert list(everything) == list(LADDER)
    saved = [row["saved"] for name, row in everything.items() if name not in COARSE]
    assert saved == sorted(set(saved), reverse=True)
    memory = everything["balanced"]["total"]
    found = data(capsys, "plan", folder, "--batch", 64, "--memory", memory)
    assert found["first that fits"] == "balanced"
    assert "get_razor_model(model, RazorConfig())" in run(capsys, "plan", folder, "--batch", 64, "--memory", memory)
    assert "Nothing fits" in run(capsys, "plan", folder, "--batch", 64, "--memory", "1MB")


def test_compact_is_left_out_for_models_without_blocks_to_compute_again(capsys, tmp_path: Path) -> None:
    config = ResNetConfig(**RESNET, architectures=["ResNetForImageClassification"])
    config.save_pretrained(tmp_path)
    found = data(capsys, "plan", tmp_path, "--image", 64, "--batch", 2, "--memory", "1TiB")["settings"]
    assert list(found) == [name for name in LADDER if name not in COMPACT]
    saved = [row["saved"] for row in found.values()]
    assert saved == sorted(set(saved), reverse=True)
    variants = data(capsys, "report", tmp_path, "--image", 64, "--batch", 2)["variants"]
    assert [name for name, row in variants.items() if row is None] == ["activation checkpointing", "razor, compact"]


@pytest.mark.parametrize("name", LADDER)
def test_what_plan_recommends_is_what_it_measured(name: str) -> None:
    variant, code = LADDER[name]
    small = ResNetForImageClassification(ResNetConfig(**RESNET))
    model = variant(small if name in COARSE else BertForSequenceClassification(BertConfig(**BERT)))
    if code:
        config = eval(code, {"RazorConfig": RazorConfig})
        assert model.razor_config.to_dict() | {"base_model_name_or_path": None} == config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "FOLDER", "--memory", "lots"], "'lots' is not an amount of memory"),
        (["report", "FOLDER", "--sequence", "1000"], "--sequence 1000 is more than the 512 tokens"),
        (["report", "FOLDER", "--batch", "0"], "0 is not at least 1"),
        (["report", "./no/such/folder"], "no/such/folder"),
        (["report", "wav2vec2"], "no task is known for models of type 'wav2vec2'"),
        (["plan", "FOLDER"], "--memory"),
    ],
)
def test_errors_are_one_line(capsys, folder: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(folder) if argument == "FOLDER" else argument for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_amounts_of_memory() -> None:
    amounts = {"8GiB": 2**33, "8gib": 2**33, "8 G": 8 * 10**9, "500MB": 5 * 10**8, "1.5Gi": 3 * 2**29, "1e9": 10**9}
    assert {text: parse_bytes(text) for text in amounts} == amounts
    for wrong in ("", "GiB", "-1GB", "0", "8 apples", "1..5G"):
        with pytest.raises(ValueError, match="not an amount of memory"):
            parse_bytes(wrong)


def test_columns_are_aligned() -> None:
    lines = table([("", "a"), ("name", "1,000"), ("x", "2")]).splitlines()
    assert lines == ["          a", "-----------", "name  1,000", "x         2"]


def test_the_command_is_installed_and_starts_fast_enough_to_ask_for_help() -> None:
    code = "import sys; from hf_backrazor.cli import main; main(['--version'])"
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"hf-backrazor {hf_backrazor.__version__}\n"
    assert "| torch\n" not in run.stderr
    assert "| transformers\n" not in run.stderr
