"""`get_razor_model`: from a model to the same model, saving packed activations."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .compat import fix_sizes, is_compiled, no_frame_of_its_own, traceable, tree_leaves
from .config import RazorConfig, settings_in_words
from .extension import Extension, can_extend, extend, restore
from .functional.rng import forked_rng
from .model_card import TAG, write_section
from .modules import RazorLMHead, RazorModule, find_blocks, with_lazy_logits
from .modules.again import State
from .modules.lm_head import leaves_after_forward
from .modules.probe import has_hooks_inside
from .prepare import choose_operators, remove_operators, take_copies
from .report import MemoryReport, measure_saved_bytes
from .targets import unmatched_targets
from .watch import is_first_forward, watched_forward

Model = TypeVar("Model", bound=nn.Module)


class RazorModel(Extension):
    """What `get_razor_model` adds to a model's class. Everything else the model had, it still has.

    Attributes:
        razor_config: the settings the model was prepared with.
    """

    razor_config: RazorConfig
    _razor_kinds: int

    @classmethod
    def members(cls, extended: type[nn.Module]) -> dict[str, Any]:
        """See `Extension.members`: a language model's forward and loss, where the compiler traces them."""
        plain = getattr(extended, "loss_function", None)
        if not isinstance(plain, property) or (loss_of := plain.fget) is None:
            return {}

        def head_of(model: nn.Module) -> RazorLMHead | None:
            return _head(model) if torch.compiler.is_dynamo_compiling() and model.training else None

        @traceable
        def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            return with_lazy_logits(loss_of(self), *args, **kwargs)

        def loss_function(self: RazorModel) -> Callable[..., Any]:
            return loss_of(self) if head_of(self) is None else functools.partial(loss, self)

        @functools.wraps(extended.forward)
        def forward(self: RazorModel, *args: Any, **kwargs: Any) -> Any:
            output, head = extended.forward(self, *args, **kwargs), head_of(self)
            return output if head is None else head.without_logits(output)

        return {"loss_function": property(loss_function, plain.fset), "forward": forward}

    # The compiler leaves this to Python, and begins with what is called here: logits are lazy tensors again after it.
    @no_frame_of_its_own
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain model's; the first training forward is watched (see `watched_forward`)."""
        if torch.compiler.is_dynamo_compiling():
            return super().__call__(*args, **kwargs)
        if not is_compiled(self):
            if "_razor_unwatched" not in self.__dict__ or not is_first_forward(self):
                return super().__call__(*args, **kwargs)
            del self._razor_unwatched
            return watched_forward(self, super().__call__, *args, **kwargs)
        head = self._before_compiled(super().__call__, args, kwargs)
        if head is None:
            return super().__call__(*args, **kwargs)
        head.razor_leaves_out = True
        try:
            output = super().__call__(*args, **kwargs)
        finally:
            # Where the compiler has broken its graph in the model, nobody has asked what logits came from.
            head.razor_leaves_out, head.razor_traced = False, None
        return head.with_logits(output)

    @torch.compiler.disable
    def _before_compiled(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RazorLMHead | None:
        """What is done before a compiled forward; the head whose logits it is not to compute, if there is one."""
        if not self.training:
            return None
        fix_sizes(args, kwargs)
        if "_razor_unwatched" in self.__dict__ and is_first_forward(self):
            del self._razor_unwatched
            if not has_hooks_inside(self):
                self._look(forward, args, kwargs)
        head = _head(self)
        return None if head is None or not head.razor_enabled or leaves_after_forward(head) else head

    def _look(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the forward once without the compiler, and leave no trace.

        What operators and warnings go by is seen in tensors that have values.
        """
        devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        with State(self).restored(), forked_rng(devices), torch.compiler.set_stance("force_eager"):
            watched_forward(self, forward, *args, **kwargs)

    def razor_modules(self) -> Iterator[tuple[str, RazorModule]]:
        """Names and modules that save packed activations. Of those with code of their own, a forward shows it."""
        razor = ((name, module) for name, module in self.named_modules() if isinstance(module, RazorModule))
        return ((name, module) for name, module in razor if module.kind != "other")

    def train(self, mode: bool = True) -> RazorModel:
        """As the plain model's. Modules that came into the model since, such as adapters, get their operators here."""
        super().train(mode)
        # Looking takes a quarter of the time that `train` takes itself.
        if mode and "_razor_kinds" in self.__dict__ and self._razor_kinds != _kinds(self):
            take_copies(self)
            choice = choose_operators(self, self.razor_config)
            choice.keep_targets(self.razor_config)
            choice.warn(stacklevel=2)
            choice.install(self.razor_config)
            self._razor_kinds = _kinds(self)
        return self

    def remove_razor(self) -> nn.Module:
        """Turn the model back into what it was before `get_razor_model`, weights as they are now, and return it."""
        modules = list(self.modules())
        remove_operators(modules)
        for module in modules:
            if isinstance(module, RazorModel):
                for name in ("razor_config", "_razor_report", "_razor_unwatched", "_razor_kinds"):
                    module.__dict__.pop(name, None)
                if TAG in (tags := module.__dict__.pop("model_tags", None) or []):
                    tags.remove(TAG)
                if tags:
                    module.model_tags = tags
                restore(module, RazorModel)
        return self

    @contextmanager
    def disable_razor(self) -> Iterator[None]:
        """Save dense activations inside the context."""
        before = [(module, module.razor_enabled) for module in self.modules() if isinstance(module, RazorModule)]
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
        plain: Any = super()
        result = plain.save_pretrained(save_directory, *args, **kwargs)
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
        plain: Any = super()
        if hasattr(plain, "create_or_update_model_card"):  # PEFT's
            plain.create_or_update_model_card(output_dir)
        name = repo_id or Path(output_dir).resolve().name
        config, report = self.razor_config, self.__dict__.get("_razor_report")
        saved = None if report is None else report.by_kind
        write_section(output_dir, name, settings_in_words(config), config.base_model_name_or_path, saved, metrics)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Where both ways of `PushToHubMixin` to the Hub meet, when all other files are written.
        self.razor_config.save_pretrained(working_dir)
        self.create_or_update_model_card(working_dir, repo_id=repo_id)
        plain: Any = super()
        return plain._upload_modified_files(working_dir, repo_id, *args, **kwargs)


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
    untyped: Any = model
    whole = [model, *([untyped.get_base_model()] if hasattr(untyped, "get_base_model") else [])]
    for prepared in whole:
        if not can_extend(prepared, RazorModel):
            raise TypeError(
                f"{type(prepared).__name__} cannot be extended: expected nn.Module before classes such as ABC or "
                "Generic among its bases"
            )
    take_copies(model)
    choice = choose_operators(model, config, find_blocks(model, config) if config.recompute == "blocks" else {}, whole)
    if unmatched := unmatched_targets(config, [*choice.operators, *choice.layers, *choice.blocks]):
        raise ValueError(
            f"no module of this {type(model).__name__} that can be replaced is matched by " + "; ".join(unmatched)
        )
    choice.keep_targets(config)
    if not (choice.operators or choice.layers or choice.blocks):
        raise ValueError(
            f"nothing to replace in this {type(model).__name__}: it has no layer of a kind that razor handles"
            + (" among those targeted" if config.target_modules or config.exclude_modules else "")
        )
    choice.warn(stacklevel=2)
    choice.install(config)
    for prepared in whole:
        extend(prepared, RazorPreTrainedModel if hasattr(type(prepared), "save_pretrained") else RazorModel)
        prepared.razor_config = config
        if hasattr(prepared, "add_model_tags"):  # of cards that Trainer writes
            prepared.add_model_tags(TAG)
    untyped._razor_unwatched = True
    untyped._razor_kinds = _kinds(model)
    return model


def _head(model: Any) -> RazorLMHead | None:
    """The head of a language model whose logits are lazy tensors."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, RazorLMHead) else None


def _kinds(model: nn.Module) -> int:
    """Another number where modules of other classes came into the model, or got a forward of their own."""
    return hash(tuple((type(module), "forward" in module.__dict__) for module in model.modules()))
