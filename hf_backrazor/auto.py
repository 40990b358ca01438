"""From a name on the Hub, or a folder, to a razor model, as PEFT's `AutoPeftModel` classes do."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from .config import RazorConfig
from .model import get_razor_model

ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


class AutoRazorModel:
    """A model with the razor in it, of the class that the `architectures` of its configuration name.

    `from_pretrained` is the way to make one; the classes for tasks (`AutoRazorModelForCausalLM`, ...) take the model
    class that Transformers' auto class for that task takes.
    """

    _task: ClassVar[str | None] = None

    def __init__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} makes models of other classes: call its `from_pretrained`")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, razor_config: RazorConfig | None = None, **kwargs: Any
    ) -> nn.Module:
        """Load a model and prepare it by `get_razor_model`.

        There are three kinds of places to load from, by what is beside `razor_config.json`: a model (`config.json` and
        weights); an adapter of PEFT's (`adapter_config.json`), which is put on its base model and can be trained
        further; or nothing, in which case the settings' `base_model_name_or_path` is loaded.

        Args:
            name_or_path: id of a repository on the Hub, or a folder.
            razor_config: settings to use in place of `razor_config.json`, which then need not be there.
            kwargs: arguments of the model's (or the adapter's) own `from_pretrained`.

        Raises:
            ValueError: `use_safetensors=False`, or an adapter that is a pickle: these are never read; or the settings
                are not legal; or the class of the model is not known.
            OSError: a file is missing, cannot be read or downloaded.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError(
                f"use_safetensors={kwargs['use_safetensors']!r} is not legal: {cls.__name__} reads safetensors only. "
                "For a pickle that you trust, load the model by its own class and call `get_razor_model` on it"
            )
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        config = razor_config or RazorConfig.from_pretrained(name_or_path, **hub)
        if _has(name_or_path, ADAPTER_CONFIG_NAME, hub):
            if not _has(name_or_path, ADAPTER_WEIGHTS_NAME, hub):  # PEFT would look for a pickle
                raise ValueError(
                    f"{str(name_or_path)!r} has no {ADAPTER_WEIGHTS_NAME}: adapters are read from that only"
                )
            model = cls._load_adapter(str(name_or_path), kwargs)
        elif _has(name_or_path, CONFIG_NAME, hub):
            model = cls._class_of(str(name_or_path), hub).from_pretrained(name_or_path, **kwargs)
        elif (base := config.base_model_name_or_path) is not None:
            kwargs.update(revision=config.revision or "main", subfolder="")
            hub.update(revision=kwargs["revision"], subfolder="")
            model = cls._class_of(base, hub).from_pretrained(base, **kwargs)
        else:
            raise ValueError(
                f"{str(name_or_path)!r} has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}, and its razor settings "
                "name no base_model_name_or_path"
            )
        return get_razor_model(model, config)

    @classmethod
    def _class_of(cls, name: str, hub: dict[str, Any]) -> Any:
        """The class to load a model by."""
        if cls._task is not None:
            return getattr(transformers, f"AutoModel{cls._task}")
        file = cached_file(name, CONFIG_NAME, **hub)
        return model_class(json.loads(Path(cast(str, file)).read_bytes()).get("architectures"), name)

    @classmethod
    def _load_adapter(cls, name: str, kwargs: dict[str, Any]) -> nn.Module:
        peft = importlib.import_module("peft")
        auto = getattr(peft, f"AutoPeftModel{cls._task or ''}", None)
        if auto is None:
            raise ValueError(
                f"{name!r} holds an adapter, and PEFT has no AutoPeftModel{cls._task}: load the base model, put the "
                "adapter on by PeftModel.from_pretrained(..., is_trainable=True), and call `get_razor_model`"
            )
        return auto.from_pretrained(name, is_trainable=True, **kwargs)


def model_class(architectures: Any, name: str) -> type[PreTrainedModel]:
    """The class of Transformers that the configuration of the model `name` lists first among its `architectures`.

    Raises:
        ValueError: it lists none, or something that is not a model of Transformers.
    """
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{CONFIG_NAME} of {name!r}: architectures={architectures!r} does not begin with a model class of "
            "Transformers; use the AutoRazorModelFor... class of the task"
        )
    return found


def _has(name_or_path: str | os.PathLike[str], file: str, hub: dict[str, Any]) -> bool:
    found = cached_file(name_or_path, file, **hub, _raise_exceptions_for_missing_entries=False)
    return found is not None


class AutoRazorModelForCausalLM(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForCausalLM`."""

    _task = "ForCausalLM"


class AutoRazorModelForImageClassification(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForImageClassification`."""

    _task = "ForImageClassification"


class AutoRazorModelForMaskedLM(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForMaskedLM`."""

    _task = "ForMaskedLM"


class AutoRazorModelForQuestionAnswering(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForQuestionAnswering`."""

    _task = "ForQuestionAnswering"


class AutoRazorModelForSemanticSegmentation(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForSemanticSegmentation`."""

    _task = "ForSemanticSegmentation"


class AutoRazorModelForSeq2SeqLM(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForSeq2SeqLM`."""

    _task = "ForSeq2SeqLM"


class AutoRazorModelForSequenceClassification(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForSequenceClassification`."""

    _task = "ForSequenceClassification"


class AutoRazorModelForTokenClassification(AutoRazorModel):
    """See `AutoRazorModel`; loads by `AutoModelForTokenClassification`."""

    _task = "ForTokenClassification"
