from __future__ import annotations

import dataclasses
import json
import os
import stat
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import transformers.utils.hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_backrazor.config as config_module
from hf_backrazor.config import (
    MAX_PATTERN_LENGTH,
    PER_OPERATOR_FIELDS,
    PRESETS,
    RAZOR_CONFIG_NAME,
    RazorConfig,
)

FIELDS = [field.name for field in dataclasses.fields(RazorConfig)]
HINTS = {name: hint for name, hint in get_type_hints(RazorConfig).items() if name in FIELDS}
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if str(get_origin(hint)) == "typing.Literal"}

names = st.text(string.ascii_lowercase + "._", min_size=1, max_size=12)
texts = st.text('a/ \n"\\é漢\ud800', max_size=8)
layers = st.integers(0, 99)
values: dict[str, st.SearchStrategy] = {name: st.sampled_from(choices) for name, choices in CHOICES.items()} | {
    "sparsity": st.floats(0, 1, exclude_max=True) | st.just(0),
    "min_numel": st.integers(0, 10**9),
    "target_modules": st.none() | names | st.lists(names, min_size=1),
    "recompute_modules": st.none() | names | st.lists(names, min_size=1),
    "exclude_modules": st.none() | names | st.lists(names),
    "layers_to_transform": st.none() | layers | st.lists(layers, min_size=1),
    "base_model_name_or_path": st.none() | texts,
    "revision": st.none() | texts,
}
operator_fields = st.fixed_dictionaries({}, optional={name: values[name] for name in PER_OPERATOR_FIELDS})
values["overrides"] = st.dictionaries(names, operator_fields, max_size=4)


def _config(fields: dict[str, Any]) -> RazorConfig:
    named = fields.get("recompute_modules") is not None  # which only mean something with blocks
    return RazorConfig(**{**fields, **({"recompute": "blocks"} if named else {})})


configs = st.fixed_dictionaries({}, optional=values).map(_config)

# No deadline: the machine may be busy with something else.
examples = settings(max_examples=60, deadline=None)

NEVER = [..., b"x", 1j, float("nan")]
NOT_AN_INDEX = [-1, True, 1.0, "1"]
NOT_MODULES = [3, True, "", "(", "*", [""], [3], [None], {"a": 1}, "a" * (MAX_PATTERN_LENGTH + 1), {"a", 3}]
WRONG: dict[str, list[Any]] = {
    name: [None, True, False, "", [], *(99 if isinstance(choice, int) else "no" for choice in choices[:1])]
    + [float(choice) for choice in choices if isinstance(choice, int)]
    + [str(choice) for choice in choices if isinstance(choice, int)]
    for name, choices in CHOICES.items()
} | {
    "sparsity": [1, 1.0, -0.1, float("inf"), True, False, "0.9", None, [0.9]],
    "min_numel": [*NOT_AN_INDEX, None, [1]],
    "target_modules": [*NOT_MODULES, []],
    "recompute_modules": [*NOT_MODULES, []],
    "exclude_modules": NOT_MODULES,
    "layers_to_transform": [*NOT_AN_INDEX, [], set(), *([item] for item in NOT_AN_INDEX), [[1]]],
    "overrides": [
        None,
        [],
        "x",
        {"a": 1},
        {"(": {}},
        {"": {}},
        {3: {}},
        {"a" * (MAX_PATTERN_LENGTH + 1): {}},
    ],
    "base_model_name_or_path": [3, True, ["x"]],
    "revision": [3, True, ["x"]],
}


def saved(config: RazorConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder / RAZOR_CONFIG_NAME


# Values


@pytest.mark.parametrize(
    ("name", "wrong"),
    # Numbered, as a set's text differs from process to process.
    [pytest.param(name, wrong, id=f"{name}-{i}") for name in FIELDS for i, wrong in enumerate(WRONG[name] + NEVER)],
)
def test_wrong_value_is_named_with_its_field_and_what_is_legal(name, wrong):
    with pytest.raises(ValueError, match=name) as caught:
        RazorConfig(**{name: wrong})
    message = str(caught.value)
    assert "expected" in message
    assert len(message) < 1000
    if name != "overrides":
        assert repr(wrong)[:200] in message or isinstance(wrong, set)
        assert all(json.dumps(choice) in message for choice in CHOICES.get(name, ()))


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_legal(name):
    for choice in CHOICES[name]:
        assert getattr(RazorConfig(**{name: choice}), name) == choice


@pytest.mark.parametrize("pattern", ["(" * (MAX_PATTERN_LENGTH - 1), "a{99999999999999999999}"])
def test_patterns_that_break_the_regex_compiler_are_wrong_values(pattern):
    with pytest.raises(ValueError, match="target_modules"):
        RazorConfig(target_modules=pattern)


def test_pattern_length_is_limited_at_the_limit():
    RazorConfig(target_modules="a" * MAX_PATTERN_LENGTH)
    with pytest.raises(ValueError, match=str(MAX_PATTERN_LENGTH)):
        RazorConfig(target_modules="a" * (MAX_PATTERN_LENGTH + 1))


@examples
@given(st.sets(names, min_size=1))
def test_sets_and_tuples_become_sorted_lists(entries):
    for given_as in (set, frozenset, tuple):
        assert RazorConfig(target_modules=given_as(entries)).target_modules == sorted(entries)


def test_a_config_shares_no_list_or_dict_with_its_caller():
    targets, overrides = ["a"], {"a": {"sparsity": 0.5}}
    config = RazorConfig(target_modules=targets, overrides=overrides)
    targets.append("b")
    overrides["a"]["sparsity"] = 2
    assert config.target_modules == ["a"]
    assert config.overrides == {"a": {"sparsity": 0.5}}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented_and_has_help(name):
    assert f"        {name}: " in RazorConfig.__doc__
    metadata = {field.name: field.metadata for field in dataclasses.fields(RazorConfig)}
    assert metadata[name]["help"]


# Presets


def test_defaults_are_balanced():
    assert RazorConfig.preset("balanced") == RazorConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_any_field(name):
    plain = RazorConfig.preset(name)
    assert RazorConfig.preset(name, min_numel=7) == dataclasses.replace(plain, min_numel=7)
    overrides = {"a": {"sparsity": 0.5}}
    assert RazorConfig.preset(name, overrides=overrides) == dataclasses.replace(plain, overrides=overrides)


def test_preset_arguments_win():
    assert RazorConfig.preset("paper", sparsity=0.5).sparsity == 0.5


def test_presets_differ():
    presets = [RazorConfig.preset(name) for name in PRESETS]
    assert all(a != b for i, a in enumerate(presets) for b in presets[:i])


def test_unknown_preset_and_field_are_named():
    with pytest.raises(ValueError, match="sharp") as caught:
        RazorConfig.preset("sharp")
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(TypeError, match="sparsness"):
        RazorConfig.preset("paper", sparsness=0.9)


# Overrides


def test_the_first_override_that_matches_holds():
    config = RazorConfig(
        overrides={
            r"layer\.0\..*": {"sparsity": 0.5},
            "query": {"residual_bits": 0},
            "query|key": {"qkv_bits": 8},
        }
    )
    expected = {
        "encoder.layer.0.query": {"sparsity": 0.5},
        "encoder.layer.1.query": {"residual_bits": 0},
        "encoder.layer.1.key": {"qkv_bits": 8},
    }
    for name, changes in expected.items():
        assert config.resolve(name) == RazorConfig(**changes)
    assert config.resolve("encoder.layer.1.value") is config


@examples
@given(configs, names)
def test_resolving_changes_only_what_the_override_says(config, name):
    resolved = config.resolve(name)
    if resolved is config:
        return
    changed = {field for field in FIELDS if getattr(resolved, field) != getattr(config, field) and field != "overrides"}
    assert any(
        changed <= set(fields) and all(getattr(resolved, field) == value for field, value in fields.items())
        for fields in config.overrides.values()
    )
    assert resolved.overrides == {}
    assert resolved.resolve(name) is resolved


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, WRONG[name][0]) for name in PER_OPERATOR_FIELDS], ids=lambda x: str(x)
)
def test_wrong_value_in_an_override_names_pattern_field_value_and_what_is_legal(name, wrong):
    with pytest.raises(ValueError, match=rf"overrides.*query.*{name}.*{wrong!r}.*expected"):
        RazorConfig(overrides={"query": {name: wrong}})


@pytest.mark.parametrize("name", [*sorted(set(FIELDS) - set(PER_OPERATOR_FIELDS)), "sparsness", 3])
def test_only_per_operator_fields_can_be_overridden(name):
    with pytest.raises(ValueError, match=f"overrides.*query.*{name}.*sparsity"):
        RazorConfig(overrides={"query": {name: None}})


# Disk


@examples
@given(configs)
def test_round_trip_through_disk(config):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = RazorConfig.from_pretrained(folder)
    assert loaded == config
    # Equal dicts may differ in order, and the order decides which override holds.
    assert list(loaded.overrides) == list(config.overrides)


@examples
@given(configs)
def test_round_trip_through_dict(config):
    assert RazorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_ignored_with_a_warning(tmp_path):
    file = saved(RazorConfig(sparsity=0.5), tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "zeal": 1, "ardour": 2}))
    with pytest.warns(UserWarning, match=rf"{config_module.__version__}.*ardour, zeal"):
        assert RazorConfig.from_pretrained(tmp_path) == RazorConfig(sparsity=0.5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b'{"sparsity": 2}',
        b'{"sparsity": NaN}',
        b'{"overrides": {"(": {}}}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_without_a_configuration_is_named(tmp_path, content):
    file = tmp_path / RAZOR_CONFIG_NAME
    file.write_bytes(content)
    with pytest.raises(ValueError, match=RAZOR_CONFIG_NAME) as caught:
        RazorConfig.from_pretrained(tmp_path)
    assert str(file) in str(caught.value)


def test_a_folder_without_the_file_is_named(tmp_path):
    with pytest.raises(OSError, match=RAZOR_CONFIG_NAME) as caught:
        RazorConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_loading_takes_fields_and_a_subfolder(tmp_path):
    saved(RazorConfig(sparsity=0.5, qkv_bits=8), tmp_path / "sub")
    loaded = RazorConfig.from_pretrained(tmp_path, subfolder="sub", sparsity=0.7, overrides={"a": {}})
    assert loaded == RazorConfig(sparsity=0.7, qkv_bits=8, overrides={"a": {}})
    with pytest.raises(TypeError, match="sparsness"):
        RazorConfig.from_pretrained(tmp_path, subfolder="sub", sparsness=0.7)
    with pytest.raises(ValueError, match=r"^sparsity=2 "):
        RazorConfig.from_pretrained(tmp_path, subfolder="sub", sparsity=2)


def test_a_field_can_mend_what_the_file_has_wrong(tmp_path):
    (tmp_path / RAZOR_CONFIG_NAME).write_text('{"weight_gradient": "int4"}')
    with pytest.raises(ValueError, match="weight_gradient"):
        RazorConfig.from_pretrained(tmp_path)
    assert RazorConfig.from_pretrained(tmp_path, weight_gradient="dense") == RazorConfig()


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = saved(RazorConfig(sparsity=0.5), tmp_path)
    before = file.read_text()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    for target, name in [(config_module.json, "dumps"), (os, "replace"), (Path, "write_text")]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match="disk full"):
                RazorConfig().save_pretrained(tmp_path)
        assert file.read_text() == before
        assert os.listdir(tmp_path) == [RAZOR_CONFIG_NAME]


def test_what_was_assigned_is_checked_before_it_is_saved(tmp_path):
    file = saved(RazorConfig(), tmp_path)
    before = file.read_text()
    config = RazorConfig()
    config.sparsity = 2
    with pytest.raises(ValueError, match="sparsity=2"):
        config.save_pretrained(tmp_path)
    assert file.read_text() == before


def test_saving_makes_folders_and_refuses_files(tmp_path):
    file = saved(RazorConfig(), tmp_path / "a" / "b")
    with pytest.raises(NotADirectoryError, match=str(file)):
        RazorConfig().save_pretrained(file)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_the_file_is_as_readable_as_any_other(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(saved(RazorConfig(), tmp_path).stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# Hub


def test_loading_from_the_hub_passes_everything_on(tmp_path, monkeypatch):
    file = saved(RazorConfig(sparsity=0.5), tmp_path)
    asked: dict[str, Any] = {}

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id, filename=filename)
        return str(file)

    monkeypatch.setattr(config_module, "hf_hub_download", download)
    where = {"revision": "v1", "subfolder": "s", "token": "t", "cache_dir": "c", "local_files_only": True}
    assert RazorConfig.from_pretrained("owner/name", **where) == RazorConfig(sparsity=0.5)
    assert asked.items() >= {**where, "repo_id": "owner/name", "filename": RAZOR_CONFIG_NAME}.items()


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("gone"), HFValidationError("gone"), OSError("gone")])
def test_failed_download_names_repository_file_and_reason(monkeypatch, error):
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(config_module, "hf_hub_download", download)
    with pytest.raises(OSError, match=rf"{RAZOR_CONFIG_NAME}.*owner/name.*gone"):
        RazorConfig.from_pretrained("owner/name")


class FakeHub:
    """Stands in for HfApi and keeps what is uploaded."""

    def __init__(self) -> None:
        self.uploads: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, repo_id: str, operations: list[Any], **kwargs: Any) -> str:
        self.uploads[repo_id] = {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations}
        return "url"


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: fake)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    return fake


def test_push_to_hub_uploads_the_file(hub):
    config = RazorConfig(sparsity=0.5)
    assert config.push_to_hub("owner/name") == "url"
    assert RazorConfig.from_dict(json.loads(hub.uploads["owner/name"][RAZOR_CONFIG_NAME])) == config


@pytest.mark.parametrize(("kwargs", "repo_id"), [({}, "my-model"), ({"repo_id": "owner/name"}, "owner/name")])
def test_saving_can_push(tmp_path, hub, kwargs, repo_id):
    file = saved(RazorConfig(), tmp_path / "my-model")
    RazorConfig().save_pretrained(file.parent, push_to_hub=True, private=True, **kwargs)
    assert hub.uploads[repo_id][RAZOR_CONFIG_NAME] == file.read_bytes()


def test_saving_refuses_arguments_that_pushing_does_not_take(tmp_path):
    with pytest.raises(TypeError, match="push_to_hb"):
        RazorConfig().save_pretrained(tmp_path, push_to_hb=True)
    assert os.listdir(tmp_path) == []


# Import


def test_import_is_light():
    heavy = ("peft", "datasets", "triton", "torch")
    code = f"import sys, hf_backrazor.config; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
