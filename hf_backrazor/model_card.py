"""The section of a model card that says how the model was trained, and what that saved."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TAG = "hf_backrazor"
CARD_NAME = "README.md"
# The form that Transformers uploads has forty such blanks; one with so many left is nobody's text yet.
_BLANK, UNFILLED = "[More Information Needed]", 30
_BEGIN, _END = "<!-- hf_backrazor -->", "<!-- end of hf_backrazor -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)


def write_section(
    folder: str | os.PathLike[str],
    name: str,
    settings: str,
    base_model: str | None,
    saved: Mapping[str, tuple[int, int]] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Put the section into `README.md` in `folder`, in place of one that is there; other text and metadata stay.

    Args:
        folder: where the model is saved.
        name: what to load the model by.
        settings: a sentence on those that the model was trained with.
        base_model: what it was before, a name on the Hub or a folder.
        saved: kind of operator -> bytes saved by a batch, dense and with razor, if that was measured.
        metrics: name -> value, to be shown.
    """
    file = Path(folder) / CARD_NAME
    if file.exists():
        card = ModelCard.load(file, ignore_metadata_errors=True)
    else:
        card = ModelCard.from_template(ModelCardData(library_name="transformers"), template_str="{{ card_data }}\n")
    tags = card.data.tags or []
    card.data.tags = tags if TAG in tags else [*tags, TAG]
    if card.data.base_model is None and _is_hub_id(base_model):
        card.data.base_model = base_model
    text = _SECTION.sub("\n", card.text).strip()
    if not text or text.count(_BLANK) >= UNFILLED:
        text = f"# {name.rsplit('/', 1)[-1]}"
    card.text = f"{text}\n\n{_section(name, settings, saved, metrics)}"
    unfinished = file.with_name(f".{CARD_NAME}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(str(card), encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _section(
    name: str, settings: str, saved: Mapping[str, tuple[int, int]] | None, metrics: Mapping[str, float] | None
) -> str:
    """The section as Markdown."""
    parts = [
        _BEGIN,
        "## Training memory",
        "For fine-tuning with hf_backrazor: the forward pass is exact, and what is saved for the backward pass is "
        "pruned to its greatest elements and a few bits for the rest "
        "([Back Razor](https://openreview.net/forum?id=mTXQIpXPDbh), NeurIPS 2022). Weights are plain; nothing is "
        "needed to use them.",
        settings,
    ]
    if saved is not None:
        parts += ["Saved for backward by one training batch:", _memory_table(saved)]
    if metrics:
        lines = ["| metric | value |", "|---|---|"]
        parts.append("\n".join(lines + [f"| {key} | {value:.4g} |" for key, value in metrics.items()]))
    parts += [
        "To train it further with the same settings:",
        f'```python\nfrom hf_backrazor import AutoRazorModel\n\nmodel = AutoRazorModel.from_pretrained("{name}")\n```',
        _END,
    ]
    return "\n\n".join(parts) + "\n"


def _memory_table(saved: Mapping[str, tuple[int, int]]) -> str:
    lines = ["| | dense, MiB | razor, MiB |", "|---|---|---|"]
    total = tuple(sum(sizes[side] for sizes in saved.values()) for side in (0, 1))
    rows = [*saved.items(), ("total", total)]
    return "\n".join(
        lines + [f"| {kind} | {dense / 2**20:.2f} | {razor / 2**20:.2f} |" for kind, (dense, razor) in rows]
    )


def _is_hub_id(name: str | None) -> bool:
    """Whether a base model can be linked to: not where it is a folder on somebody's machine."""
    return name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
