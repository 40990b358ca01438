"""To the Hub and back, by the real client, against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Repository, running_hub
from huggingface_hub import ModelCard

pytest.importorskip("peft")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], dict[str, Repository]]]:
    """What the client saw, and the repositories that it left."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # by a service elsewhere
        }
        client = Path(__file__).with_name("hub_client.py")
        run = subprocess.run([sys.executable, client, folder], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        assert hub.unknown == []  # all that was asked for is what the server knows
        yield json.loads(run.stdout.splitlines()[-1]), hub.repositories


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("loads by architectures", True),
        ("settings arrive", True),
        ("loads by task", True),
        ("loads without razor", True),
        ("settings can be given", 0.9),
        ("revisions", True),
        ("save_pretrained pushes", True),
        ("settings alone name a base model", True),
        ("their settings hold", 8),
        ("config round trip", 8),
        ("adapters", True),
        ("adapters train on", True),
        ("Trainer pushes", True),
    ],
)
def test_what_goes_up_comes_down(visit, fact: str, expected: object) -> None:
    assert visit[0][fact] == expected


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("error: no such repository", ["OSError", "razor_config.json", "someone/nothing"]),
        ("error: pickles", ["ValueError", "use_safetensors=False", "safetensors only"]),
        ("error: only a pickle there", ["OSError", "someone/pickled", "safetensors"]),
        ("error: no settings there", ["OSError", "razor_config.json", "someone/without"]),
    ],
)
def test_errors_say_what_is_missing(visit, fact: str, said: list[str]) -> None:
    assert all(words in visit[0][fact] for words in said), visit[0][fact]


@pytest.mark.parametrize("name", ["model", "saved", "settings", "adapter", "trained"])
def test_settings_and_card_go_along_in_the_commit_of_the_weights(visit, name: str) -> None:
    repository = visit[1][f"someone/{name}"]
    for _sha, message, files in repository.commits[1:]:
        if any(file.endswith(".safetensors") for file in files):
            assert "razor_config.json" in files, message
            # Trainer writes its card at the end.
            assert "README.md" in files or message.startswith("Training in progress"), message
    assert not any(file.endswith((".bin", ".pt", ".pkl")) and file != "training_args.bin" for file in repository.files)
    assert not any(file.startswith(".") and file != ".gitattributes" for file in repository.files)
    card = ModelCard(repository.files["README.md"].decode())
    assert "hf_backrazor" in card.data.tags


def test_the_card_says_settings_memory_and_how_to_go_on(visit) -> None:
    text = visit[1]["someone/model"].files["README.md"].decode()
    assert "`activation_bits=3`" in text
    assert "`overrides={'dense': {'sparsity': 0.5}}`" in text
    assert "| linear |" in text
    assert "| total |" in text
    assert 'AutoRazorModel.from_pretrained("someone/model")' in text
    assert "[More Information Needed]" not in text
    # It was pushed twice.
    assert text.count("## Training memory") == 1
    assert len(visit[1]["someone/model"].commits) == 3


def test_the_card_of_settings_names_the_base_model(visit) -> None:
    card = ModelCard(visit[1]["someone/settings"].files["README.md"].decode())
    assert card.data.base_model == "someone/model"
    assert "weights" not in visit[1]["someone/settings"].files


def test_trainers_card_keeps_its_text(visit) -> None:
    text = visit[0]["Trainer's card with the section"]
    assert "Training hyperparameters" in text
    assert "| accuracy | 0.75 |" in text
    assert text.index("Training hyperparameters") < text.index("## Training memory")
