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
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import regex
from huggingface_hub import hf_hub_download
from transformers.utils import PushToHubMixin

from . import __version__
from .model_card import write_section
from .targets import match_pattern

RAZOR_CONFIG_NAME = "razor_config.json"

# All of these may come from a file on the Hub. No model needs patterns that long, so many of them, or a file that big.
MAX_PATTERN_LENGTH = 1000
MAX_REPETITIONS = 10_000
MAX_ENTRIES = 1000
MAX_FILE_BYTES = 2**20

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
    "stream_bits",
    "min_numel",
)

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sparsity": 0.9,
        "granularity": "sample",
        "residual_bits": 0,
        "norm": "input",
        "norm_bits": 0,
        "value_dtype": "float16",  # the released ViT code builds its model with half=True
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
        "stream_bits": 32,
    },
    "balanced": {},
    "fast": {"weight_gradient": "int8"},
    # Little is left outside of the blocks, but what its gradient loses goes through all of them.
    "compact": {"recompute": "blocks", "residual_bits": 4, "norm_bits": 8, "activation_bits": 8, "qkv_bits": 8},
}
PRESETS = tuple(_PRESETS)

Bits = Literal[0, 1, 2, 3, 4, 8]

Config = TypeVar("Config", bound="RazorConfig")


@dataclass
class RazorConfig(PushToHubMixin):
    """What is stored of each saved activation, and in which modules. The forward pass stays the same.

    The defaults are the preset `"balanced"`; `RazorConfig.preset` has the others.

    Args:
        sparsity: fraction of a saved activation's elements not kept exactly, in [0, 1). 0 keeps all of them.
        granularity: what top-k runs over: `"row"` (last dimension), `"sample"` (batch item) or `"tensor"`.
        residual_bits: bits an element, 0 to 4 or 8, for what top-k leaves over of a linear layer's input. 0: it unpacks
            to zero, as in the paper. Otherwise it is kept as a code with one scale per row; and an input that
            another operator's copy restores (a norm's x_hat, an activation function's input, the factors of a
            gated product) is restored from that, in that operator's bits, and takes no codes of its own.
        norm: what a norm stores: `"x_hat"`, its normalised output, or `"input"` (the paper; those of feature maps keep
            it whole then, as the paper's code does).
        norm_bits: what `residual_bits` is, for the tensor a norm stores.
        value_dtype: dtype of the elements kept exactly: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"` or
            `"int8"`; never wider than the tensor itself. `"auto"`: the tensor's own dtype at sparsity 0 or if
            it has 16 bits, bfloat16 if it has more. `"float16"`: magnitudes above 65504 become infinite, and show
            in the gradient. `"int8"`: with one scale per set that top-k runs over.
        attention: `"recompute"` stores q, k, v in `qkv_bits` and computes probabilities again in backward; and modules
            that save much which no operator takes, such as attention that is written out, are computed again from their
            inputs in 8 bits. `"sparse"`, the paper's, stores probabilities, q, k, v sparse, ignores `qkv_bits`, and
            computes nothing again.
        qkv_bits: bits for q, k, v: 4 or 8 (a code for the deviation from the mean over tokens, one scale per head
            and token; at 4 bits with the elements beyond `sparsity` exact), 16 (half precision) or 32 (unchanged).
        activation_bits: bits an element for the input of an activation function, from which its derivative and its
            output are restored: 2, 3, 4 or 8 (the number of the interval that it lies in), 16 (half precision) or 32
            (unchanged). ReLU always stores 1 for its derivative. Also what `residual_bits` is, for the factors of a
            gated product.
        weight_gradient: how a linear layer's is computed: `"dense"`, in floats; or `"int8"`, from the codes as
            integers and the output's gradient rounded to 8 bits at random (so that its mean is exact; a seed is drawn
            from torch's CPU generator). Where what is stored is not coded, or the device has no fast product of
            integers, `"int8"` is the same as `"dense"`.
        recompute: what is computed again in backward: `"none"`, or `"blocks"`: whole blocks (the layers of a
            transformer) keep their input alone, packed, as activation checkpointing does with the dense one, and run
            again from it. What lies outside of them is stored as without.
        recompute_modules: the blocks: their names, or what their names end in after a dot, or the names of their
            classes; or one regular expression for all of a name or of a class's. None: the layers that Transformers
            checkpoints. Inside of each other, the innermost count. They are exempt from `target_modules`.
        stream_bits: bits an element for what changed in a block's input since the block before: 2, 3, 4 or 8, with the
            elements beyond `sparsity` exact; the first block's input takes 8. 32: inputs are kept as they are.
        target_modules: modules to replace. A list: their names, or what their names end in after a dot. A
            string: one regular expression for the whole name. None: all that can be replaced.
        exclude_modules: modules to leave as they are, in the same form. None: none.
        layers_to_transform: index, or list of indices (0 and up), of the layers to which the replaced modules
            must belong. A module's layer is the first integer in its dotted name. None: anywhere.
        overrides: settings for some of the modules: from a pattern to the fields that differ there, out of
            `PER_OPERATOR_FIELDS`. The pattern is a regular expression for the whole name, or for all that
            follows one of its dots. The first that matches holds.
        min_numel: tensors of fewer elements are saved as they are (0 and up). Packing one takes some 0.1 ms whatever
            its size, so that a step is faster dense where its tensors have less than about 2^19 elements; what these
            take is little, and 0 packs them all.
        base_model_name_or_path: Hub id or folder of the model prepared with these settings, if known.
        revision: revision of that model on the Hub, if known.

    Tuples and sets become sorted lists. A regular expression has at most `MAX_PATTERN_LENGTH` characters.

    Raises:
        ValueError: a field has a value it cannot have. The message names field, value and what is legal.
    """

    sparsity: float = field(default=0.99, metadata={"help": "Fraction of elements not kept exactly, in [0, 1)."})
    granularity: Literal["row", "sample", "tensor"] = field(
        default="row", metadata={"help": "The set of elements that top-k runs over."}
    )
    residual_bits: Bits = field(default=3, metadata={"help": "Bits for what top-k leaves over of a linear's input."})
    norm: Literal["x_hat", "input"] = field(
        default="x_hat", metadata={"help": "What a norm stores: its normalised output or its input."}
    )
    norm_bits: Bits = field(default=3, metadata={"help": "As residual_bits, for the tensor a norm stores."})
    value_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = field(
        default="auto", metadata={"help": "Dtype of elements kept exactly; never wider than the tensor's."}
    )
    attention: Literal["recompute", "sparse"] = field(
        default="recompute", metadata={"help": "Recompute probabilities from q, k, v, or store them sparse."}
    )
    qkv_bits: Literal[4, 8, 16, 32] = field(
        default=4, metadata={"help": "Bits for q, k, v when probabilities are recomputed."}
    )
    activation_bits: Literal[2, 3, 4, 8, 16, 32] = field(
        default=4, metadata={"help": "Bits for an activation function's input."}
    )
    weight_gradient: Literal["dense", "int8"] = field(
        default="dense", metadata={"help": "How weight gradients are computed: in floats, or by 8-bit integers."}
    )
    recompute: Literal["none", "blocks"] = field(
        default="none", metadata={"help": "What is computed again in backward: nothing, or whole blocks."}
    )
    recompute_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes, classes or one regex of the blocks; None: Transformers' own."}
    )
    stream_bits: Literal[2, 3, 4, 8, 32] = field(
        default=4, metadata={"help": "Bits for what changed in a block's input since the block before."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or one regex of the modules to replace; None: all."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or one regex of the modules to leave as they are."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers in which modules are replaced; None: all."}
    )
    overrides: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Module pattern to the fields that differ there."}
    )
    min_numel: int = field(default=0, metadata={"help": "Tensors of fewer elements are saved as they are."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model prepared with these settings."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of that model on the Hub."})

    def __post_init__(self) -> None:
        for item in fields(self):
            setattr(self, item.name, _checked(item.name, getattr(self, item.name)))
        if self.recompute_modules is not None and self.recompute == "none":
            raise ValueError(
                f'recompute_modules={_short(self.recompute_modules)} has no effect with recompute="none": expected '
                'recompute="blocks"'
            )

    @classmethod
    def preset(cls: type[Config], name: str, **changes: Any) -> Config:
        """A named set of settings.

        Args:
            name: `"paper"` (what Back Razor's paper stores), `"lossless"` (every gradient is autograd's),
                `"balanced"` (the defaults), `"fast"` or `"compact"` (blocks are computed again from a packed input).
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
            The first override whose pattern matches, applied, with `overrides` empty; `self` if none does.
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
            raise ValueError(f"expected a JSON object (a dict), not a {type(data).__name__}")
        known = {item.name for item in fields(cls)}
        if unknown := ", ".join(sorted(str(key) for key in data if key not in known)):
            warnings.warn(f"ignored, as hf_backrazor {__version__} does not know it: {unknown}", stacklevel=2)
        return cls(**{key: value for key, value in data.items() if key in known})

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `razor_config.json`. It appears whole or not at all; one that was there stays until then.

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
            raise NotADirectoryError(f"cannot save {RAZOR_CONFIG_NAME} in {folder}: it is a file")
        # Keys are not sorted: overrides depend on their order. `replace` checks what was assigned since.
        text = json.dumps(replace(self).to_dict(), indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        # Not from tempfile, whose files only their owner may read.
        unfinished = folder / f".{RAZOR_CONFIG_NAME}.{uuid.uuid4().hex}"
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, folder / RAZOR_CONFIG_NAME)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        if push_to_hub:
            self.push_to_hub(**kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Where `PushToHubMixin` uploads; the card that it writes is one of a model.
        write_section(working_dir, repo_id, settings_in_words(self), self.base_model_name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

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
            changes: fields that differ from the file (not `revision`, which here is the repository's).

        Raises:
            OSError: there is no such file, or it cannot be read or downloaded.
            ValueError: the file holds no razor configuration, or a field has a value it cannot have.
            TypeError: there is no such field as one in `changes`.
        """
        cls(**changes)  # so that mistakes in them are not put down to the file
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
                    cache_dir=cache_dir,  # type: ignore[arg-type]  # it takes any path
                    local_files_only=local_files_only,
                    library_name="hf_backrazor",
                    library_version=__version__,
                )
            except (OSError, ValueError) as error:
                raise OSError(f"cannot get {RAZOR_CONFIG_NAME} of {str(name_or_path)!r}: {error}") from error
        try:
            if (size := os.path.getsize(file)) > MAX_FILE_BYTES:
                raise ValueError(f"it has {size} bytes, more than {MAX_FILE_BYTES}")
            data = json.loads(Path(file).read_bytes())
            return cls.from_dict({**data, **changes} if isinstance(data, dict) else data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a razor configuration: {error}") from error


def _one_of(choices: tuple[Any, ...]) -> str:
    return f"one of {', '.join(map(json.dumps, choices))}"


def _is_among(choices: tuple[Any, ...], value: Any) -> bool:
    # By type too: True == 1 and 4.0 == 4.
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: Any) -> bool:
    # May raise what compiling does; `_require` passes the reason on.
    if not (isinstance(value, str) and 0 < len(value) <= MAX_PATTERN_LENGTH and re.compile(value)):
        return False
    # `regex`, which will match it (see `targets`), writes out repetitions: ((a{1000}){1000}){1000} takes gigabytes.
    repetitions = prod(int(count) for count in re.findall(r"(\d+)}", value))
    return repetitions <= MAX_REPETITIONS and bool(regex.compile(value))


def _is_modules(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= MAX_ENTRIES and all(isinstance(item, str) and item for item in value)
    return value is None or _is_pattern(value)


def _is_layers(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= MAX_ENTRIES and all(map(_is_index, value))
    return value is None or _is_index(value)


_PATTERN = f"a valid regular expression of 1 to {MAX_PATTERN_LENGTH} characters, repetitions below {MAX_REPETITIONS}"
_SOME_MODULES = (
    lambda value: value != [] and _is_modules(value),
    f"a list of 1 to {MAX_ENTRIES} names, {_PATTERN}, or None",
)
_TEXT = (lambda value: value is None or isinstance(value, str), "a string or None")

# Field -> whether a value is legal, and what is, in words. Of Literal fields, the type says it.
_LEGAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sparsity": (
        lambda value: (isinstance(value, float) or _is_index(value)) and 0 <= value < 1,
        "a number in [0, 1)",
    ),
    "target_modules": _SOME_MODULES,
    "recompute_modules": _SOME_MODULES,
    "exclude_modules": (_is_modules, f"a list of at most {MAX_ENTRIES} names, {_PATTERN}, or None"),
    "layers_to_transform": (_is_layers, f"an integer of at least 0, a list of 1 to {MAX_ENTRIES} of these, or None"),
    "min_numel": (_is_index, "an integer of at least 0"),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "overrides": (
        lambda value: isinstance(value, Mapping) and len(value) <= MAX_ENTRIES,
        f"a dict from at most {MAX_ENTRIES} patterns to dicts of fields",
    ),
} | {
    name: (partial(_is_among, get_args(hint)), _one_of(get_args(hint)))
    for name, hint in get_type_hints(RazorConfig).items()
    if get_origin(hint) is Literal
}


def _checked(name: str, value: Any) -> Any:
    """`value` as field `name` holds it; ValueError if it cannot."""
    if isinstance(value, (tuple, set, frozenset)):
        # What cannot be sorted is not legal either, and is told so below.
        with contextlib.suppress(TypeError):
            value = sorted(value)
    _require(name, value, *_LEGAL[name])
    if name == "overrides":
        return {pattern: _checked_override(pattern, changes) for pattern, changes in value.items()}
    if name == "sparsity":
        return float(value)
    return list(value) if isinstance(value, list) else value


def _checked_override(pattern: Any, changes: Any) -> dict[str, Any]:
    _require("overrides pattern", pattern, _is_pattern, _PATTERN)
    where = f"overrides[{_short(pattern)}]"
    _require(where, changes, lambda value: isinstance(value, Mapping), "a dict of fields")
    for name, value in changes.items():
        if name not in PER_OPERATOR_FIELDS:
            legal = _one_of(PER_OPERATOR_FIELDS)
            raise ValueError(f"{where}: {name}={_short(value)} is not legal: expected a field, {legal}")
    try:
        return {name: _checked(name, value) for name, value in changes.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def settings_in_words(config: RazorConfig) -> str:
    """A sentence for model cards: the preset, or what differs from the defaults."""
    plain = replace(config, base_model_name_or_path=None, revision=None)
    for preset in PRESETS:
        if plain == RazorConfig.preset(preset):
            return f"Settings: the preset `{preset}` of hf_backrazor {__version__}."
    default = RazorConfig()
    changed = [
        f"`{item.name}={getattr(plain, item.name)!r}`"
        for item in fields(plain)
        if getattr(plain, item.name) != getattr(default, item.name)
    ]
    return f"Settings: the defaults of hf_backrazor {__version__}, but {', '.join(changed)}."


def _require(what: str, value: Any, is_legal: Callable[[Any], bool], legal: str) -> None:
    reason = ""
    try:
        if is_legal(value):
            return
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        reason = f" ({error})"
    raise ValueError(f"{what}={_short(value)} is not legal{reason}: expected {legal}")


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
