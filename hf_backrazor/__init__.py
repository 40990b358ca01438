"""Back Razor for Hugging Face models: the forward pass exact, the saved activations small."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Public name -> the module it lives in. Imported on first use: `import hf_backrazor` does not pay for Transformers.
_EXPORTS = {
    "AutoRazorModel": "auto",
    "AutoRazorModelForCausalLM": "auto",
    "AutoRazorModelForImageClassification": "auto",
    "AutoRazorModelForMaskedLM": "auto",
    "AutoRazorModelForQuestionAnswering": "auto",
    "AutoRazorModelForSemanticSegmentation": "auto",
    "AutoRazorModelForSeq2SeqLM": "auto",
    "AutoRazorModelForSequenceClassification": "auto",
    "AutoRazorModelForTokenClassification": "auto",
    "MemoryReport": "report",
    "RazorCallback": "callback",
    "RazorConfig": "config",
    "RazorModel": "model",
    "SavedBytes": "report",
    "StepMemory": "estimate",
    "estimate_saved_bytes": "estimate",
    "estimate_step_memory": "estimate",
    "freeze_batch_norms": "frozen_batch_norm",
    "get_razor_model": "model",
    "measure_saved_bytes": "report",
}

if TYPE_CHECKING:
    from .auto import (
        AutoRazorModel,
        AutoRazorModelForCausalLM,
        AutoRazorModelForImageClassification,
        AutoRazorModelForMaskedLM,
        AutoRazorModelForQuestionAnswering,
        AutoRazorModelForSemanticSegmentation,
        AutoRazorModelForSeq2SeqLM,
        AutoRazorModelForSequenceClassification,
        AutoRazorModelForTokenClassification,
    )
    from .callback import RazorCallback
    from .config import RazorConfig
    from .estimate import StepMemory, estimate_saved_bytes, estimate_step_memory
    from .frozen_batch_norm import freeze_batch_norms
    from .model import RazorModel, get_razor_model
    from .report import MemoryReport, SavedBytes, measure_saved_bytes

__all__ = [
    "AutoRazorModel",
    "AutoRazorModelForCausalLM",
    "AutoRazorModelForImageClassification",
    "AutoRazorModelForMaskedLM",
    "AutoRazorModelForQuestionAnswering",
    "AutoRazorModelForSemanticSegmentation",
    "AutoRazorModelForSeq2SeqLM",
    "AutoRazorModelForSequenceClassification",
    "AutoRazorModelForTokenClassification",
    "MemoryReport",
    "RazorCallback",
    "RazorConfig",
    "RazorModel",
    "SavedBytes",
    "StepMemory",
    "__version__",
    "estimate_saved_bytes",
    "estimate_step_memory",
    "freeze_batch_norms",
    "get_razor_model",
    "measure_saved_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
