"""What razor does for every model type of the installed Transformers: small models with random weights.

    python recipes/benchmark_model_types.py

needs no download and takes some five minutes on two CPU cores; `--types llama bert` tries some alone. A model of two
layers and hidden size 128 (the type's own defaults otherwise, dropout as well) does one training step dense, one with
`lossless` and one forward each with `balanced` and `compact`. The columns:

- forward: whether all outputs are equal to the bit, razor's `lossless` beside dense;
- gradients: the greatest deviation of `lossless`, relative to the greatest gradient;
- balanced, compact: how many times less is saved for backward;
- rest: the module that saves most with `balanced` where the factor is below 6, and its share.

Types that cannot be made small by their configuration's common names, or need inputs of their own, are listed below
the table, with what they failed at.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import statistics
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, PreTrainedConfig, set_seed
from transformers.models.auto import modeling_auto

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes

# The first of these that has a class for the type is trained.
TASKS = [
    "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION", "MODEL_FOR_OBJECT_DETECTION", "MODEL_FOR_DEPTH_ESTIMATION", "MODEL_FOR_CTC",
    "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_VIDEO_CLASSIFICATION", "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL_FOR_QUESTION_ANSWERING", "MODEL_FOR_PRETRAINING", "MODEL",
]  # fmt: skip
BATCH, LENGTH, VOCABULARY, IMAGE = 2, 64, 1000, 64
HIDDEN, LAYERS, HEADS, INNER = 128, 2, 4, 256

# Names that configurations use -> the value for a small model.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "hidden_dim"), HIDDEN),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    "decoder_attention_heads": HEADS,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_dim"), INNER // 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "head_dim": HIDDEN // HEADS,
    "d_kv": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "image_size": IMAGE,
    "num_labels": 5,
    "use_cache": False,
    # Linear attention and state spaces.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HIDDEN // HEADS),
    "state_size": 16,
    "mamba_d_state": 16,
    # Latent attention.
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    # Embeddings of another width.
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), HIDDEN),
}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id", "sep_token_id")


def small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of the class for a small model, those inside of it small as well."""
    default = config_class()
    changes: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in SMALL and value is not None and not isinstance(value, (list, tuple, dict)):
            changes[name] = SMALL[name]
        elif name in TOKENS and isinstance(value, int) and value >= VOCABULARY:
            changes[name] = 1
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        present = getattr(default, name, None)
        if isinstance(present, PreTrainedConfig):
            kind = type(present) if inner.__name__ == "AutoConfig" else inner
            changes[name] = small_config(kind).to_dict()
    config = config_class(**changes)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def model_class(kind: str) -> type[nn.Module] | None:
    """The class that is trained for this type."""
    for task in TASKS:
        names = getattr(modeling_auto, f"{task}_MAPPING_NAMES", {}).get(kind)
        if names:
            return getattr(transformers, names[0] if isinstance(names, (list, tuple)) else names)
    return None


def batch_for(model: nn.Module) -> dict[str, Any]:
    """Inputs by the names that the model's forward takes."""
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.randint(5, min(VOCABULARY, getattr(text, "vocab_size", None) or VOCABULARY), (BATCH, LENGTH))
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        batch: dict[str, Any] = {"input_ids": ids}
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", IMAGE)
        height, width = (size, size) if isinstance(size, int) else size
        batch = {"pixel_values": torch.randn(BATCH, getattr(vision, "num_channels", 3), height, width)}
        if "input_ids" in accepted:
            batch["input_ids"] = ids
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        frames = 2 * getattr(config, "max_source_positions", 64)
        by_time = "fft" in type(model).__name__.lower() or "Whisper" not in type(model).__name__
        shape = (BATCH, frames, bins) if by_time else (BATCH, bins, frames)
        batch = {"input_features": torch.randn(shape)}
    elif main == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        shape = (BATCH, getattr(config, "max_length", 128), bins) if bins else (BATCH, 8000)
        batch = {"input_values": torch.randn(shape)}
    else:
        raise ValueError(f"takes {main}")
    if "bbox" in accepted:
        batch["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.int64)
    labels = labels_for(model, batch, ids)
    if labels is not None and "labels" in accepted:
        batch["labels"] = labels
    if "labels" not in batch and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = ids
    return batch


def labels_for(model: nn.Module, batch: dict[str, Any], ids: Tensor) -> Any:
    name = type(model).__name__
    if any(
        task in name for task in ("CausalLM", "LMHead", "MaskedLM", "ForConditionalGeneration", "TokenClassification")
    ):
        return ids % 5 if "TokenClassification" in name else ids
    if "CTC" in name:
        return torch.randint(3, 20, (BATCH, 8))
    if "Classification" in name:
        return torch.arange(BATCH)
    if "SemanticSegmentation" in name:
        return torch.randint(5, (BATCH, *batch["pixel_values"].shape[-2:]))
    return None


def loss_of(output: Any) -> Tensor:
    """The model's loss, or something of its outputs that has a gradient."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.sum()
    floats = [x for x in tree_leaves(dict(output)) if isinstance(x, Tensor) and x.requires_grad]
    # Not their squares: the mean square of what a norm returns is 1, with no gradient.
    generator = torch.Generator().manual_seed(0)
    return sum((x.float() * torch.randn(x.shape, generator=generator)).mean() for x in floats)


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    set_seed(1)  # numpy's as well: speech models draw their masks from it
    output = model(**batch)
    loss_of(output).backward()
    # Losses of language models are summed in another order.
    kept = {name: value for name, value in dict(output).items() if "loss" not in name}
    outputs = [x.detach().clone() for x in tree_leaves(kept) if isinstance(x, Tensor)]
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def saved(model: nn.Module, batch: dict[str, Any]) -> Any:
    set_seed(1)
    return measure_saved_bytes(model, **batch)


def try_type(kind: str) -> dict[str, Any]:
    """A row of the table, or at what stage it failed and how."""
    stage = "configuration"
    try:
        cls = model_class(kind)
        if cls is None:
            return {"type": kind, "failed": "no model for a task"}
        config = small_config(CONFIG_MAPPING[kind])
        stage = "model"
        torch.manual_seed(0)
        model = cls(config).train()
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > 60e6:
            return {"type": kind, "failed": f"model: {parameters / 1e6:.0f} million parameters"}
        batch = batch_for(model)
        stage = "dense step"
        with torch.no_grad():
            model(**batch)  # in which BigBird changes its attention
        outputs, expected = step(copy.deepcopy(model), batch)
        dense = saved(copy.deepcopy(model), batch).total
    except Exception as error:
        return {"type": kind, "failed": f"{stage}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    row: dict[str, Any] = {"type": kind, "class": cls.__name__, "dense_mib": dense / 2**20}
    try:
        stage = "lossless"
        found_outputs, found = step(get_razor_model(copy.deepcopy(model), RazorConfig.preset("lossless")), batch)
        row["forward"] = len(outputs) == len(found_outputs) and all(map(_equal, outputs, found_outputs))
        row["gradients"] = _deviation(found, expected)
        stage = "balanced"
        razor = get_razor_model(copy.deepcopy(model))
        left = saved(razor, batch)
        row["balanced"] = dense / left.total
        if row["balanced"] < 6:
            name, most = max(left.by_module.items(), key=lambda each: each[1])
            owner = type(razor.get_submodule(name)).__name__
            row["rest"] = f"{name or 'the model itself'} ({owner}), {100 * most / left.total:.0f} %"
        row["cosine"] = _cosine(step(razor, batch)[1], expected)
        stage = "compact"
        try:
            compact = get_razor_model(copy.deepcopy(model), RazorConfig.preset("compact"))
        except ValueError as error:
            if "recompute" not in str(error):
                raise
            row["compact"] = None  # no blocks of Transformers'
        else:
            row["compact"] = dense / saved(compact, batch).total
            loss_of(compact(**batch)).backward()
    except Exception as error:
        row["error"] = f"{stage}: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return row


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    expected = {name: grad for name, grad in expected.items() if grad.numel()}
    most = max((grad.abs().max().item() for grad in expected.values()), default=0.0)
    return max((found[name] - grad).abs().max().item() for name, grad in expected.items()) / (most or 1.0)


def _cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    pairs = [(found[name].flatten().double(), grad.flatten().double()) for name, grad in expected.items()]
    product, a, b = (
        sum(float(x @ y) for x, y in each) for each in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
    )
    return product / ((a * b) ** 0.5 or 1.0)


def isolated(kind: str, seconds: float) -> dict[str, Any]:
    """`try_type` in a process of its own, as some types end it or take for ever."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(kind, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"type": kind, "failed": f"took over {seconds:.0f} s"}
    except EOFError:
        return {"type": kind, "failed": "its process ended"}
    finally:
        process.kill()
        process.join()


def _send(kind: str, sender: Connection) -> None:
    sender.send(try_type(kind))


HEADER = (
    "| type | class | dense, MiB | forward | gradients | balanced | cosine | compact | rest |",
    "|---|---|---|---|---|---|---|---|---|",
)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["type"], row["class"], f"{row['dense_mib']:.1f}"]
    cells += ["equal" if row.get("forward") else "**differs**", f"{row.get('gradients', float('nan')):.0e}"]
    cells.append(f"{row['balanced']:.1f}" if "balanced" in row else "-")
    cells.append(f"{row['cosine']:.3f}" if "cosine" in row else "-")
    cells.append(f"{row['compact']:.1f}" if row.get("compact") else "-")
    cells.append(row.get("error") or row.get("rest", ""))
    return "| " + " | ".join(cells) + " |"


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    ran = [row for row in rows if "failed" not in row]
    if not ran:
        return
    balanced = [row["balanced"] for row in ran if "balanced" in row]
    compact = [row["compact"] for row in ran if row.get("compact")]
    yield ""
    yield f"{len(ran)} types ran, {sum('error' in row for row in ran)} with an error of razor's"
    yield f"forward equal: {sum(bool(row.get('forward')) for row in ran)}"
    cosines = [row["cosine"] for row in ran if "cosine" in row]
    if cosines:
        yield f"cosine of the gradient of balanced: median {statistics.median(cosines):.3f}, lowest {min(cosines):.3f}"
    yield f"gradients within 1e-4: {sum(row.get('gradients', 1) < 1e-4 for row in ran)}"
    for name, factors in (("balanced", balanced), ("compact", compact)):
        if factors:
            few = sum(factor < 6 for factor in factors)
            yield f"{name}: {len(factors)} types, median {statistics.median(factors):.1f}, {few} below 6"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=sorted(CONFIG_MAPPING), metavar="TYPE", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="types at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="that a type may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    print(*HEADER, sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda kind: isolated(kind, args.seconds), args.types or sorted(CONFIG_MAPPING)):
            rows.append(row)
            if "failed" not in row:
                print(line(row), flush=True)
    print(*summary(rows), sep="\n")
    print(*(f"- {row['type']}: {row['failed']}" for row in rows if "failed" in row), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
