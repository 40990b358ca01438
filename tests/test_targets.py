from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_backrazor.config import RazorConfig
from hf_backrazor.targets import layer_index, match_pattern, matches_target, unmatched_targets

NAMES = [
    "embeddings.norm",
    *(f"encoder.layer.{i}.{part}" for i in range(3) for part in ("attention.query", "attention.key", "output.norm")),
    "lm_head",
]
component = st.text("abcxyz_0123456789", min_size=1, max_size=6)
names = st.lists(component, min_size=1, max_size=5).map(".".join)
# No deadline: the machine may be busy with something else.
examples = settings(deadline=None)


def matched(**settings) -> list[str]:
    return [name for name in NAMES if matches_target(RazorConfig(**settings), name)]


@examples
@given(names)
def test_nothing_set_targets_everything(name):
    assert matches_target(RazorConfig(), name)


@examples
@given(names, names)
def test_entry_is_the_name_or_what_follows_a_dot(entry, name):
    is_tail = name.split(".")[-len(entry.split(".")) :] == entry.split(".")
    assert matches_target(RazorConfig(target_modules=[entry]), name) == is_tail
    assert matches_target(RazorConfig(exclude_modules=[entry]), name) == (not is_tail)


def test_string_is_a_regex_for_the_whole_name():
    assert matched(target_modules=r".*\.(query|key)") == [n for n in NAMES if n.endswith(("query", "key"))]
    assert matched(target_modules="query") == []
    assert matched(exclude_modules=r"encoder\..*") == ["embeddings.norm", "lm_head"]


def test_dots_in_a_list_are_dots():
    assert not matches_target(RazorConfig(target_modules=["a.b"]), "x.aXb")


def test_exclusion_beats_targeting():
    assert matched(target_modules=["query", "key"], exclude_modules=["layer.1.attention.query", "key"]) == [
        "encoder.layer.0.attention.query",
        "encoder.layer.2.attention.query",
    ]


@pytest.mark.parametrize("layers", [1, [1], (1,), {1}])
def test_layers_restrict_and_leave_out_modules_in_no_layer(layers):
    assert matched(layers_to_transform=layers) == [n for n in NAMES if ".1." in n]
    assert matched(layers_to_transform=layers, target_modules=r".*norm") == ["encoder.layer.1.output.norm"]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.12.experts.3.up", 12),
        ("h.0", 0),
        ("layers.7.q", 7),
        ("lm_head", None),
        ("conv1d.layer2a.x", None),
        ("stage.².x", None),
    ],
)
def test_layer_index_is_the_first_integer_component(name, index):
    assert layer_index(name) == index


@examples
@given(component, names)
def test_pattern_without_specials_matches_as_an_entry_does(pattern, name):
    assert match_pattern(pattern, name) == matches_target(RazorConfig(target_modules=[pattern]), name)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("query", "encoder.0.query", True),
        ("query", "encoder.0.xquery", False),
        ("query", "encoder.query.dense", False),
        ("query|key", "encoder.0.key", True),
        (r"layer\.[01]\..*", "encoder.layer.1.query", True),
        (r"layer\.[01]\..*", "encoder.layer.2.query", False),
        (r"(?i)QUERY", "encoder.query", True),
        (r"(a)\1", "x.aa", True),
        (r"^encoder\..*", "encoder.query", True),
    ],
)
def test_pattern_matches_the_name_or_what_follows_a_dot(pattern, name, expected):
    assert match_pattern(pattern, name) is expected


@examples
@given(names, names)
def test_patterns_are_read_as_peft_reads_rank_pattern(pattern, name):
    other = pytest.importorskip("peft.utils.other")
    read_by_peft = other.get_pattern_key([pattern], name) == pattern
    assert match_pattern(pattern, name) == (read_by_peft or pattern == name)


def test_unmatched_names_what_matches_nothing_and_only_that():
    config = RazorConfig(
        target_modules=["query", "querry"],
        exclude_modules=["absent"],
        layers_to_transform=[0, 9],
        overrides={"key": {"sparsity": 0.5}, "kee": {"sparsity": 0.5}},
    )
    assert unmatched_targets(config, NAMES) == [
        "target_modules entry 'querry'",
        "overrides pattern 'kee'",
        "layers_to_transform index 9",
    ]
    assert unmatched_targets(RazorConfig(target_modules="quer+y"), iter(NAMES)) == ["target_modules regex 'quer+y'"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": ["norm"]}, {"target_modules": ".*norm"}, {"layers_to_transform": 0}],
)
def test_nothing_is_unmatched_where_all_match(settings):
    assert unmatched_targets(RazorConfig(**settings), iter(NAMES)) == []


def test_any_object_with_the_fields_will_do():
    fields = {"target_modules": None, "exclude_modules": None, "layers_to_transform": 0, "overrides": {}}
    assert matches_target(SimpleNamespace(**fields), "h.0.mlp")


def test_import_is_light():
    code = "import sys, hf_backrazor.targets; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
