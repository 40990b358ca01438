"""Files from elsewhere are data: whatever they hold, there is one clear error; nothing runs, hangs or fills memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from safetensors.torch import save_file

from hf_backrazor import AutoRazorModel, AutoRazorModelForSequenceClassification, RazorConfig, get_razor_model
from hf_backrazor.config import MAX_ENTRIES, MAX_FILE_BYTES, RAZOR_CONFIG_NAME


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A razor model's folder."""
    model, _ = make("bert")
    get_razor_model(model).save_pretrained(tmp_path)
    return tmp_path


def with_settings(folder: Path, **fields: Any) -> Path:
    (folder / RAZOR_CONFIG_NAME).write_text(json.dumps({**RazorConfig().to_dict(), **fields}))
    return folder


class Long(torch.nn.Module):
    """A model whose layers have long names."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a" * 200, torch.nn.Linear(4, 4))


@pytest.mark.parametrize("pattern", ["(a|aa)+!", "(.|..|...)+!", "((([a-z]|[a-z_])+)+)+0", r"(\w|\w\w|_)*#"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "overrides"])
def test_a_pattern_cannot_hang(field: str, pattern: str) -> None:
    value = {pattern: {"sparsity": 0.5}} if field == "overrides" else pattern
    start = time.monotonic()
    # Some are seen through; of those that take too long, the pattern and the name are named.
    with contextlib.suppress(ValueError):
        get_razor_model(Long(), RazorConfig(**{field: value}))
    assert time.monotonic() - start < 15


def test_a_pattern_that_takes_too_long_is_named() -> None:
    with pytest.raises(ValueError, match=r"the pattern '\(a\|aa\)\+!' takes more than 1 s .* 'aaaa.*'"):
        get_razor_model(Long(), RazorConfig(target_modules="(a|aa)+!"))


BOMBS = ["((a{1000}){1000}){1000}", "(?:(?:(?:a{0,999}){0,999}){0,999}){0,999}b", "(?R)" * 200, "(" * 400 + ")" * 400]

LIMITED = """
import resource, sys
from hf_backrazor import RazorConfig
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
for pattern in sys.argv[1:]:
    try:
        RazorConfig(target_modules=pattern)
    except ValueError as error:
        assert "target_modules=" in str(error)
    else:
        raise AssertionError(pattern)
"""


def test_a_pattern_cannot_fill_memory_when_it_is_compiled() -> None:
    subprocess.run([sys.executable, "-c", LIMITED, *BOMBS], check=True, timeout=60)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["x"] * (MAX_ENTRIES + 1)},
        {"layers_to_transform": list(range(MAX_ENTRIES + 1))},
        {"overrides": {f"x{i}": {} for i in range(MAX_ENTRIES + 1)}},
        {"target_modules": "__import__('os').system('true')("},
        {"sparsity": "__import__('os')"},
        {"residual_bits": 10**400},
        {"overrides": {"x": {"target_modules": "y"}}},
        {"base_model_name_or_path": {"a": 1}},
    ],
)
def test_settings_out_of_bounds_are_named(saved: Path, fields: dict[str, Any]) -> None:
    with_settings(saved, **fields)
    with pytest.raises(ValueError, match=f"{RAZOR_CONFIG_NAME} is not a razor configuration: .*{next(iter(fields))}"):
        AutoRazorModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"sparsity": 0.9', b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' * 100_000],
    ids=["empty", "brace", "half", "list", "null", "bytes", "deep list", "deep dict"],
)
def test_half_written_or_foreign_settings_give_one_error(saved: Path, content: bytes) -> None:
    (saved / RAZOR_CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{RAZOR_CONFIG_NAME} is not a razor configuration"):
        RazorConfig.from_pretrained(saved)
    assert (saved / RAZOR_CONFIG_NAME).read_bytes() == content


def test_huge_settings_are_not_read(saved: Path) -> None:
    with open(saved / RAZOR_CONFIG_NAME, "wb") as file:
        file.truncate(2**40)  # a hole: it takes no disk
    with pytest.raises(ValueError, match=f"1099511627776 bytes, more than {MAX_FILE_BYTES}"):
        RazorConfig.from_pretrained(saved)


@pytest.mark.parametrize(
    "architectures", [["os.system"], ["AutoTokenizer"], [], None, "BertModel", [["x"]], ["pipeline"]]
)
def test_architectures_name_nothing_but_models(saved: Path, architectures: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match="does not begin with a model class of Transformers"):
        AutoRazorModel.from_pretrained(saved)


class Bomb:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_pickles_are_not_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, saved / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoRazorModel.from_pretrained(saved)
    with pytest.raises(ValueError, match="use_safetensors=False is not legal"):
        AutoRazorModel.from_pretrained(saved, use_safetensors=False)
    assert not (tmp_path / "exploded").exists()


def test_pickled_adapters_are_not_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model, _ = make("bert")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], base_model_name_or_path=str(saved))
    folder = tmp_path / "adapter"
    get_razor_model(peft.get_peft_model(model, config)).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        AutoRazorModelForSequenceClassification.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 7, 100, -100])
def test_half_written_weights_give_an_error(saved: Path, kept: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|corrupt"):
        AutoRazorModel.from_pretrained(saved)
    assert RazorConfig.from_pretrained(saved) == RazorConfig()


def test_remote_code_does_not_run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "unheard",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text("import os; os.mkdir('exploded')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoRazorModelForSequenceClassification.from_pretrained(saved, trust_remote_code=False)
    assert not (tmp_path / "exploded").exists()


def test_a_failed_save_leaves_the_earlier_settings(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / RAZOR_CONFIG_NAME).read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        RazorConfig(qkv_bits=8).save_pretrained(saved)
    assert (saved / RAZOR_CONFIG_NAME).read_bytes() == before
    assert not list(saved.glob(".*"))


def test_weights_of_another_model_do_not_pass_unnoticed(saved: Path) -> None:
    save_file({"embedding": torch.zeros(2)}, saved / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoRazorModelForSequenceClassification._class_of(str(saved), {}).from_pretrained(
        saved, output_loading_info=True
    )
    assert info["missing_keys"]
