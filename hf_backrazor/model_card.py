"""The section of a model card that says how the model was trained, and what that saved."""

from __future__ import annotations

import dataclasses
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from . import __version__
from .config import PRESETS, RazorConfig
from .report import MemoryReport

TAG = "hf_backrazor"
CARD_NAME = "README.md"
# The form that Transformers uploads has forty such blanks; one with so many left is nobody's text yet.
_BLANK, UNFILLED = "[More Information Needed]", 30
_BEGIN, _END = "<!-- hf_backrazor -->", "<!-- end of hf_backrazor -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)


def write_section(
    folder: str | os.PathLike[str],
    config: RazorConfig,
    report: MemoryReport | None,
    metrics: Mapping[str, float],
    name: str,
) -> None:
    """Put the section into `README.md` in `folder`, in place of one that is there; other text and metadata stay.

    Args:
        folder: where the model is saved.
        config: the settings that the model was trained with.
        report: what they saved, if that was measured.
        metrics: name -> value, to be shown.
        name: what to load the model by.
    """
    file = Path(folder) / CARD_NAME
    if file.exists():
        card = ModelCard.load(file, ignore_metadata_errors=True)
    else:
        card = ModelCard.from_template(ModelCardData(library_name="transformers"), template_str="{{ card_data }}\n")
    tags = card.data.tags or []
    card.data.tags = tags if TAG in tags else [*tags, TAG]
    if card.data.base_model is None and _is_hub_id(config.base_model_name_or_path):
        card.data.base_model = config.base_model_name_or_path
    text = _SECTION.sub("\n", card.text).strip()
    if not text or text.count(_BLANK) >= UNFILLED:
        text = f"# {name.rsplit('/', 1)[-1]}"
    card.text = f"{text}\n\n{section(config, report, metrics, name)}"
    unfinished = file.with_name(f".{CARD_NAME}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(str(card), encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def section(config: RazorConfig, report: MemoryReport | None, metrics: Mapping[str, float], name: str) -> str:
    """The section as Markdown."""
    parts = [
        _BEGIN,
        "## Training memory",
        "For fine-tuning with hf_backrazor: the forward pass is exact, and what is saved for the backward pass is "
        "pruned to its greatest elements and a few bits for the rest "
        "([Back Razor](https://openreview.net/forum?id=mTXQIpXPDbh), NeurIPS 2022). Weights are plain; nothing is "
        "needed to use them.",
        _settings(config),
    ]
    if report is not None:
        parts += ["Saved for backward by one training batch:", _memory_table(report)]
    if metrics:
        lines = ["| metric | value |", "|---|---|"]
        parts.append("\n".join(lines + [f"| {key} | {value:.4g} |" for key, value in metrics.items()]))
    parts += [
        "To train it further with the same settings:",
        f'```python\nfrom hf_backrazor import AutoRazorModel\n\nmodel = AutoRazorModel.from_pretrained("{name}")\n```',
        _END,
    ]
    return "\n\n".join(parts) + "\n"


def _settings(config: RazorConfig) -> str:
    plain = dataclasses.replace(config, base_model_name_or_path=None, revision=None)
    for preset in PRESETS:
        if plain == RazorConfig.preset(preset):
            return f"Settings: the preset `{preset}` of hf_backrazor {__version__}."
    default = RazorConfig()
    changed = [
        f"`{item.name}={getattr(plain, item.name)!r}`"
        for item in dataclasses.fields(plain)
        if getattr(plain, item.name) != getattr(default, item.name)
    ]
    return f"Settings: the defaults of hf_backrazor {__version__}, but {', '.join(changed)}."


def _memory_table(report: MemoryReport) -> str:
    lines = ["| | dense, MiB | razor, MiB |", "|---|---|---|"]
    rows = [*report.by_kind.items(), ("total", (report.dense_bytes, report.razor_bytes))]
    return "\n".join(
        lines + [f"| {kind} | {dense / 2**20:.2f} | {razor / 2**20:.2f} |" for kind, (dense, razor) in rows]
    )


def _is_hub_id(name: str | None) -> bool:
    """Whether a base model can be linked to: not where it is a folder on somebody's machine."""
    return name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
