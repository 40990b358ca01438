"""`RazorConfig`: what the user chooses."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from huggingface_hub import hf_hub_download
from transformers.utils import PushToHubMixin

from . import __version__
from .targets import match_pattern


RAZOR_CONFIG_NAME = "razor_config.json"

# Patterns may come from a file on the Hub. No module name needs one that long.
MAX_PATTERN_LENGTH = 1000

PER_OPERATOR_FIELDS = (
    "sparsity",
    "granularity",
    "residual_bits",
    "norm",
    "norm_bits",
    "value_dtype",
    "attention",
    "qkv_bits",
    "activation_bits",
    "weight_gradient",
    "min_numel",
)

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sparsity": 0.9,
        "granularity": "sample",
        "residual_bits": 0,
        "norm": "input",
        "norm_bits": 0,
        "value_dtype": "float32",
        "attention": "sparse",
        "activation_bits": 16,
    },
    "lossless": {
        "sparsity": 0.0,
        "residual_bits": 0,
        "norm": "input",
        "norm_bits": 0,
        "value_dtype": "auto",
        "attention": "recompute",
        "qkv_bits": 32,
        "activation_bits": 32,
    },
    "balanced": {},
    "fast": {"qkv_bits": 8, "activation_bits": 8},
}
PRESETS = tuple(_PRESETS)

Granularity = Literal["row", "sample", "tensor"]
ResidualBits = Literal[0, 1, 2, 3, 4]
NormStores = Literal["x_hat", "input"]
ValueDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
AttentionMode = Literal["recompute", "sparse"]
QKVBits = Literal[4, 8, 16, 32]
ActivationBits = Literal[2, 3, 4, 8, 16, 32]
WeightGradient = Literal["dense"]

Config = TypeVar("Config", bound="RazorConfig")


@dataclass
class RazorConfig(PushToHubMixin):
    """What is stored of each saved activation, and in which modules. The forward pass does not depend on it.

    The defaults are the preset `"balanced"`. `"paper"`, `"lossless"` and `"fast"` are the other presets, see
    [`RazorConfig.preset`].

    Args:
        sparsity: fraction of a saved activation's elements that are not kept exactly, in [0, 1). 0 keeps all of them.
        granularity: the set of elements that top-k runs over: `"row"` (the last dimension), `"sample"` (all of one
            batch item) or `"tensor"`.
        residual_bits: bits an element, 0 to 4, for what top-k leaves over. 0: it unpacks to zero, as in the paper.
            Otherwise it is kept as a code with one scale per row.
        norm: the tensor a LayerNorm or RMSNorm stores: `"x_hat"`, its normalised output, or `"input"`, its input, as
            the paper's code does.
        norm_bits: what `residual_bits` is, for the tensor a norm stores.
        value_dtype: dtype of the elements kept exactly: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"` or `"int8"`;
            never wider than the tensor itself. `"auto"`: the tensor's own dtype at sparsity 0 or if it has 16 bits,
            bfloat16 if it has more. `"int8"`: with one scale per set that top-k runs over.
        attention: `"recompute"` stores q, k and v in `qkv_bits` and computes the probabilities again in the backward
            pass; `"sparse"` is the paper's: sparse probabilities, q, k and v, and `qkv_bits` is ignored.
        qkv_bits: bits an element of q, k and v: 4 or 8 (a code with one scale per row), 16 (half precision) or 32
            (unchanged).
        activation_bits: bits an element that an activation function stores: 2, 3, 4 or 8 (a code for its
            derivative), 16 (its input in half precision, from which the derivative is computed) or 32 (its input
            unchanged). ReLU always stores 1.
        weight_gradient: how weight gradients are computed: `"dense"`, from the unpacked tensor. (`"int8"` is
            a reserved name, not available in this version.)
        target_modules: modules to replace. A list: their names, or what their names end in after a dot. A string:
            one regular expression for the whole name. None: all that can be replaced.
        exclude_modules: modules to leave as they are, in the same form. None: none.
        layers_to_transform: index, or list of indices (0 and up), of the layers to which the replaced modules must
            belong. A module's layer is the first integer in its dotted name. None: anywhere.
        overrides: settings for some of the modules: from a pattern to the fields that differ there. The pattern is a
            regular expression for a whole name, or for all that follows one of its dots; the first one that matches
            holds. The fields are those in `PER_OPERATOR_FIELDS`.
        min_numel: tensors of fewer elements are saved as they are (0 and up).
        base_model_name_or_path: Hub id or folder of the model that was prepared with these settings, if known.
        revision: revision of that model on the Hub, if known.

    A tuple or set given for a list becomes a sorted list. Regular expressions have at most `MAX_PATTERN_LENGTH`
    characters.

    Raises:
        ValueError: a field has a value it cannot have. The message names the field, the value and what is legal.
    """

    sparsity: float = field(
        default=0.99, metadata={"help": "Fraction of elements not kept exactly, in [0, 1)."}
    )
    granularity: Granularity = field(
        default="row", metadata={"help": "The set of elements that top-k runs over: row, sample or tensor."}
    )
    residual_bits: ResidualBits = field(
        default=2, metadata={"help": "Bits (0 to 4) for what top-k leaves over; 0: it unpacks to zero."}
    )
    norm: NormStores = field(
        default="x_hat", metadata={"help": "What a norm stores: its normalised output (x_hat) or its input."}
    )
    norm_bits: ResidualBits = field(
        default=4, metadata={"help": "Bits (0 to 4) for what top-k leaves over of the tensor a norm stores."}
    )
    value_dtype: ValueDtype = field(
        default="auto",
        metadata={"help": "Dtype of exactly kept elements: auto, float32, bfloat16, float16 or int8."},
    )
    attention: AttentionMode = field(
        default="recompute",
        metadata={"help": "recompute (from q, k, v in qkv_bits) or sparse (the paper's) probabilities."},
    )
    qkv_bits: QKVBits = field(
        default=4, metadata={"help": "Bits for q, k, v when attention is recomputed: 4, 8, 16 or 32."}
    )
    activation_bits: ActivationBits = field(
        default=4,
        metadata={"help": "Bits an activation function stores: 2, 3, 4 or 8 (derivative), 16 or 32 (input)."},
    )
    weight_gradient: WeightGradient = field(
        default="dense", metadata={"help": "How weight gradients are computed: dense."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or suffixes (list) or regex (str) of modules to replace; None: all."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or suffixes (list) or regex (str) of modules to leave as they are."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers in which modules are replaced; None: all."}
    )
    overrides: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "Module pattern to fields that differ there; the first pattern that matches holds."
        },
    )
    min_numel: int = field(
        default=0, metadata={"help": "Tensors of fewer elements than this are saved as they are."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model prepared with these settings."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of that model on the Hub."})

    def __post_init__(self) -> None:
        for item in fields(self):
            setattr(self, item.name, _checked(item.name, getattr(self, item.name)))

    @classmethod
    def preset(cls: type[Config], name: str, **changes: Any) -> Config:
        """A named set of settings.

        Args:
            name: `"paper"` (what Back Razor's paper stores), `"lossless"` (every gradient equal to autograd's),
                `"balanced"` (the defaults) or `"fast"`.
            changes: fields to set differently.

        Raises:
            ValueError: there is no such preset, or a field has a value it cannot have.
            TypeError: there is no such field.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset {name!r} does not exist: expected {_one_of(PRESETS)}")
        return cls(**{**_PRESETS[name], **changes})

    def resolve(self: Config, name: str) -> Config:
        """The settings that hold for the module called `name`.

        Returns:
            With the first override whose pattern matches applied and `overrides` empty; `self` if none matches.
        """
        for pattern, changes in self.overrides.items():
            if match_pattern(pattern, name):
                return replace(self, overrides={}, **changes)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields, in values that JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
        """The configuration that `to_dict` was called on.

        Fields this version does not know, as a later one may have, are ignored with a warning.

        Raises:
            ValueError: `data` is no dict, or a field has a value it cannot have.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a razor configuration is a JSON object (a dict), not a {type(data).__name__}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(str(key) for key in data if key not in known):
            warnings.warn(
                f"ignored, as hf_backrazor {__version__} has no such setting: {', '.join(unknown)}",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in data.items() if key in known})

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `razor_config.json`. The file appears whole or not at all; one that was there stays until then.

        Args:
            save_directory: the folder to write to, made if it does not exist.
            push_to_hub: also upload the file.
            kwargs: arguments of `push_to_hub`; `repo_id` is the folder's name by default.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            ValueError: a field was assigned a value it cannot have.
            TypeError: `push_to_hub` has no such argument.
        """
        folder = Path(save_directory)
        kwargs.setdefault("repo_id", folder.resolve().name)
        inspect.signature(self.push_to_hub).bind(**kwargs)
        if folder.is_file():
            raise NotADirectoryError(
                f"cannot save {RAZOR_CONFIG_NAME} in {folder}: it is a file, not a folder"
            )
        # Key order is kept, for overrides depend on it. `replace` checks what was assigned since construction.
        text = json.dumps(replace(self).to_dict(), indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        # Not from tempfile, whose files only their owner may read.
        unfinished = folder / f".{RAZOR_CONFIG_NAME}.{uuid.uuid4().hex}"
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, folder / RAZOR_CONFIG_NAME)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        if push_to_hub:
            self.push_to_hub(**kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Config],
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> Config:
        """Read `razor_config.json`.

        Args:
            name_or_path: a folder, or the id of a repository on the Hub.
            revision: branch, tag or commit of that repository.
            subfolder: where in the folder or repository the file is.
            token: access token for the Hub; True, the one that is stored.
            cache_dir: where downloads are kept.
            local_files_only: only look among those.
            changes: fields to set differently from the file (except `revision`, which here is the repository's).

        Raises:
            OSError: there is no such file, or it cannot be read or downloaded.
            ValueError: what is in the file is no razor configuration, or a field has a value it cannot have.
            TypeError: there is no such field as one in `changes`.
        """
        # Alone first, so that mistakes in them are not put down to the file.
        cls(**changes)
        if os.path.isdir(name_or_path):
            file = os.path.join(name_or_path, subfolder or "", RAZOR_CONFIG_NAME)
        else:
            try:
                file = hf_hub_download(
                    str(name_or_path),
                    RAZOR_CONFIG_NAME,
                    revision=revision,
                    subfolder=subfolder,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    library_name="hf_backrazor",
                    library_version=__version__,
                )
            except (OSError, ValueError) as error:
                raise OSError(
                    f"no {RAZOR_CONFIG_NAME} in {str(name_or_path)!r}, which is not a folder, nor from the Hub: {error}"
                ) from error
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise OSError(f"cannot read {file}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        try:
            return cls.from_dict({**data, **changes} if isinstance(data, dict) else data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


# Fields that have a few legal values, and those values, as their types say.
_CHOICES = {
    name: get_args(hint) for name, hint in get_type_hints(RazorConfig).items() if get_origin(hint) is Literal
}


def _checked(name: str, value: Any) -> Any:
    """`value` as field `name` holds it; ValueError if it cannot."""
    if name == "overrides":
        return _overrides(value)
    try:
        return _choice(name, value) if name in _CHOICES else _CHECKS[name](value)
    except ValueError as error:
        raise ValueError(f"{name}={_short(value)} is not legal: expected {error}") from None


# Each of these returns the value as the field holds it, or raises ValueError with what is legal.


def _choice(name: str, value: Any) -> Any:
    # By type too: True == 1 and 4.0 == 4.
    if any(type(value) is type(choice) and value == choice for choice in _CHOICES[name]):
        return value
    if name == "weight_gradient" and value == "int8":
        raise ValueError('"dense"; "int8" is not available in this version, use "dense"')
    raise ValueError(_one_of(_CHOICES[name]))


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError("a number in [0, 1)")
    return float(value)


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("an integer of at least 0")
    return value


def _layers(value: Any) -> list[int] | int | None:
    try:
        if value is None or isinstance(value, int):
            return value if value is None else _index(value)
        if layers := [_index(item) for item in _as_list(value)]:
            return layers
    except ValueError:
        pass
    raise ValueError("an integer of at least 0, a list of at least one of these, or None")


def _modules(value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value if value is None else _pattern(value)
    with contextlib.suppress(ValueError):
        names = _as_list(value)
        if all(isinstance(item, str) and item for item in names):
            return names
    raise ValueError("a list of names, a regular expression (a string), or None")


def _targets(value: Any) -> list[str] | str | None:
    if (modules := _modules(value)) == []:
        raise ValueError(
            "a list of at least one name, a regular expression (a string), or None for all modules"
        )
    return modules


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a regular expression that is not empty")
    if len(value) > MAX_PATTERN_LENGTH:
        raise ValueError(f"a regular expression of at most {MAX_PATTERN_LENGTH} characters, not {len(value)}")
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"a valid regular expression ({error})") from None
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("a string or None")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "sparsity": _fraction,
    "target_modules": _targets,
    "exclude_modules": _modules,
    "layers_to_transform": _layers,
    "min_numel": _index,
    "base_model_name_or_path": _text,
    "revision": _text,
}


def _overrides(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"overrides={_short(value)} is not legal: expected a dict from patterns to dicts of fields"
        )
    checked: dict[str, dict[str, Any]] = {}
    for pattern, changes in value.items():
        where = f"overrides[{_short(pattern)}]"
        try:
            _pattern(pattern)
        except ValueError as error:
            raise ValueError(f"{where}: the pattern is not legal: expected {error}") from None
        if not isinstance(changes, Mapping):
            raise ValueError(f"{where}={_short(changes)} is not legal: expected a dict of fields")
        for name, setting in changes.items():
            if name not in PER_OPERATOR_FIELDS:
                raise ValueError(
                    f"{where}: {name}={_short(setting)} is not legal: expected a field out of {_one_of(PER_OPERATOR_FIELDS)}"
                )
        try:
            checked[pattern] = {name: _checked(name, setting) for name, setting in changes.items()}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return checked


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return list(value)
    if isinstance(value, (tuple, set, frozenset)):
        with contextlib.suppress(TypeError):
            return sorted(value)
    raise ValueError


def _one_of(choices: tuple[Any, ...]) -> str:
    *most, last = map(json.dumps, choices)
    return f"{', '.join(most)} or {last}" if most else last


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
