"""`get_razor_model`: from a model to the same model, saving packed activations."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .config import RazorConfig
from .extension import Extension, can_extend, extend, restore, runs_its_class
from .model_card import TAG, write_section
from .modules import (
    OPERATORS,
    RazorBlock,
    RazorInline,
    RazorLMHead,
    RazorModule,
    RazorOutermost,
    find_blocks,
    stack_blocks,
)
from .report import MemoryReport, measure_saved_bytes
from .targets import matches_target, unmatched_targets
from .watch import is_first_forward, watched_forward

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

Model = TypeVar("Model", bound=nn.Module)


class RazorModel(Extension, _Module):
    """What `get_razor_model` adds to a model's class. Everything else the model had, it still has.

    Attributes:
        razor_config: the settings the model was prepared with.
    """

    razor_config: RazorConfig

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain model's; the first training forward is watched (see `watched_forward`)."""
        if torch.compiler.is_compiling() or "_razor_unwatched" not in self.__dict__ or not is_first_forward(self):
            return super().__call__(*args, **kwargs)
        del self._razor_unwatched
        return watched_forward(self, super().__call__, *args, **kwargs)

    def razor_modules(self) -> Iterator[tuple[str, RazorModule]]:
        """Names and modules that save packed activations."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, RazorModule))

    def remove_razor(self) -> nn.Module:
        """Turn the model back into what it was before `get_razor_model`, weights as they are now, and return it."""
        _remove(self)
        return self

    @contextmanager
    def disable_razor(self) -> Iterator[None]:
        """Save dense activations inside the context."""
        before = [(module, module.razor_enabled) for _, module in self.razor_modules()]
        try:
            for module, _ in before:
                module.razor_enabled = False
            yield
        finally:
            for module, enabled in before:
                module.razor_enabled = enabled

    def memory_report(self, **batch: Any) -> MemoryReport:
        """Measure what each module saves for backward, dense and razor.

        Runs two training-mode forward passes on `batch`, and leaves mode, buffers and random state as they were.

        Args:
            batch: the arguments of the model's forward.
        """
        with self.disable_razor():
            dense = measure_saved_bytes(self, **batch)
        self._razor_report = MemoryReport.of(self, dense, measure_saved_bytes(self, **batch))
        return self._razor_report


class RazorPreTrainedModel(RazorModel):
    """Of models that can be saved and pushed to the Hub."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the plain model's; `razor_config.json` goes beside the weights."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.razor_config.save_pretrained(save_directory)
        return result

    def create_or_update_model_card(
        self,
        output_dir: str | os.PathLike[str],
        metrics: Mapping[str, float] | None = None,
        repo_id: str | None = None,
    ) -> None:
        """Write into the model card in `output_dir` how the model was trained: settings, memory, metrics, how to go on.

        `push_to_hub` does so by itself; this is for cards that others write, such as Trainer's. What the last
        `memory_report` measured goes into it.

        Args:
            output_dir: folder of `README.md`, which is made if it is not there. Its other text and metadata stay.
            metrics: name -> value, to be shown.
            repo_id: what to load the model by (default: the name of the folder).
        """
        if hasattr(super(), "create_or_update_model_card"):  # PEFT's
            super().create_or_update_model_card(output_dir)
        name = repo_id or Path(output_dir).resolve().name
        write_section(output_dir, self.razor_config, self.__dict__.get("_razor_report"), metrics or {}, name)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Where both ways of `PushToHubMixin` to the Hub meet, when all other files are written.
        self.razor_config.save_pretrained(working_dir)
        self.create_or_update_model_card(working_dir, repo_id=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def get_razor_model(model: Model, config: RazorConfig | None = None) -> Model:
    """Make `model` save packed activations in training.

    The same object is returned. Its class, and the classes of the modules replaced, are extended in place: it is still
    an instance of the type it was, with the same parameters and state-dict keys. Outside of training it computes what
    it did before, by the same code; in training its forward pass gives the same result to the bit.

    Args:
        model: a Transformers model, a PEFT model, or any other module made of the same parts.
        config: the settings (default: `RazorConfig()`).

    Raises:
        TypeError: the model's class has a base such as `abc.ABC` before `nn.Module`.
        ValueError: the model is a razor model already; or nothing in it can be replaced; or a target in the config
            matches nothing that can be.
    """
    for name, module in model.named_modules():
        if isinstance(module, (RazorModel, RazorModule)):
            raise ValueError(
                f"{name or 'this'} ({type(module).__name__}) was prepared by `get_razor_model` already; call "
                "`remove_razor()` on the model that came from it first"
            )
    config = dataclasses.replace(config) if config is not None else RazorConfig()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None

    # What PEFT's `merge_and_unload` will return is a razor model too.
    whole = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    for prepared in whole:
        if not can_extend(prepared, RazorModel):
            raise TypeError(
                f"{type(prepared).__name__} cannot be extended: expected nn.Module before classes such as ABC or "
                "Generic among its bases"
            )
    _take_copies(model)
    heads = _heads(model)
    replaced: dict[str, tuple[nn.Module, type[RazorModule]]] = {}
    skipped: dict[str, list[str]] = defaultdict(list)
    blocks = find_blocks(model, config) if config.recompute == "blocks" else {}
    within = {id(inner) for block in blocks.values() for inner in block.modules()}
    for name, module in model.named_modules():
        if id(module) in within:
            continue
        operator = next((operator for operator in OPERATORS if operator.handles(module)), None)
        if module in heads and RazorLMHead.handles(module):
            operator = RazorLMHead
        if operator is RazorInline and module in whole:
            operator = RazorOutermost
        elif operator is not None and not name:
            skipped["its forward is that of the model itself"].append(type(module).__name__)
            continue
        if operator is not None and not runs_its_class(module):
            skipped["its forward was replaced on the instance"].append(name)
        elif operator is not None and not can_extend(module, operator):
            skipped["a class such as ABC or Generic comes first among the bases of its class"].append(name)
        elif operator is not None:
            replaced[name] = (module, operator)
        elif matches_target(config, name):
            for reason in filter(None, (operator.cannot_handle(module) for operator in OPERATORS)):
                skipped[reason].append(name)
    if unmatched := unmatched_targets(config, [*replaced, *blocks]):
        raise ValueError(
            f"no module of this {type(model).__name__} that can be replaced is matched by " + "; ".join(unmatched)
        )
    replaced = {name: found for name, found in replaced.items() if matches_target(config, name)}
    replaced |= {name: (block, RazorBlock) for name, block in blocks.items()}
    if not replaced:
        raise ValueError(
            f"nothing to replace in this {type(model).__name__}: it has no layer of a kind that razor handles"
            + (" among those targeted" if config.target_modules or config.exclude_modules else "")
        )
    for reason, names in skipped.items():
        warnings.warn(f"saved dense, as {reason}: {_enumerate(names)}", stacklevel=2)

    try:
        for name, (module, operator) in replaced.items():
            operator.install(module, config.resolve(name))
        stack_blocks(blocks)
        for prepared in whole:
            saves = hasattr(type(prepared), "save_pretrained")
            extend(prepared, RazorPreTrainedModel if saves else RazorModel)
            prepared.razor_config = config
            if hasattr(prepared, "add_model_tags"):  # of cards that Trainer writes
                prepared.add_model_tags(TAG)
    except BaseException:
        _remove(model)  # all or nothing
        raise
    model._razor_unwatched = True
    return model


def _remove(model: nn.Module) -> None:
    """Turn `model` back into what it was, weights as they are now."""
    model.__dict__.pop("_razor_unwatched", None)
    for module in list(model.modules()):
        if isinstance(module, RazorModel):
            module.__dict__.pop("razor_config", None)
            module.__dict__.pop("_razor_report", None)
            if TAG in (tags := module.__dict__.pop("model_tags", None) or []):
                tags.remove(TAG)
            if tags:
                module.model_tags = tags
        if isinstance(module, RazorModule):
            module.clear()
        if isinstance(module, (RazorModel, RazorModule)):
            restore(module, RazorModel, RazorModule)


def _take_copies(model: nn.Module) -> None:
    """Give `model` copies of modules that belong to no model.

    All models of some architectures hold one object, `transformers.activations.gelu`: preparing that would change them
    all.
    """
    common = _common_modules(model)
    copies: dict[nn.Module, nn.Module] = {}
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child in common:
                owner._modules[name] = copies.setdefault(child, copy.deepcopy(child))


def _common_modules(model: nn.Module) -> set[nn.Module]:
    """Modules without state that Python modules and signatures hold, where the classes of `model` were written.

    Not those of the script that runs: what is made there is its author's to share.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    held: list[Any] = []
    for source in {cls.__module__ for cls in classes} - {"__main__"}:
        held += vars(sys.modules[source]).values() if source in sys.modules else ()
    for cls in classes:
        if inspect.isfunction(cls.__init__):
            held += cls.__init__.__defaults__ or ()
            held += (cls.__init__.__kwdefaults__ or {}).values()
    for collection in [each for each in held if type(each) in (dict, list, tuple)]:
        held += collection.values() if isinstance(collection, dict) else collection
    inside = {module for module in model.modules() if _has_no_state(module)}
    return {each for each in held if isinstance(each, nn.Module) and each in inside and each is not model}


def _has_no_state(module: nn.Module) -> bool:
    return not any(True for held in (module.parameters(), module.buffers(), module.children()) for _ in held)


def _heads(model: nn.Module) -> set[nn.Module | None]:
    """The layers that give a language model's logits, also of one inside of another module (a reward, a Lightning
    module)."""
    heads: set[nn.Module | None] = set()
    for module in model.modules():
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        # In PEFT's `modules_to_save` each adapter has a copy, beside the original.
        copies = getattr(head, "modules_to_save", None)
        heads |= {head} if copies is None else {head.original_module, *copies.values()}
    return heads


def _enumerate(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
