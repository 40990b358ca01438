"""Razor models sharded by FSDP, beside the same models in one process; started by test_distributed.py.

    accelerate launch --multi_gpu --num_processes 2 distributed_sharding.py FOLDER

Writes `FOLDER/rank<N>.json`: case -> what this rank saw.
"""

from __future__ import annotations

import copy
import functools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from architectures import VOCABULARY, Batch, make
from distributed_gradients import ITEMS, four_items
from distributed_worker import run_worker
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.modules.lm_head import LazyLogits


def layer_names(model: nn.Module) -> list[str]:
    """The classes that Transformers names for sharding, but embeddings: Accelerate shards these by itself."""
    return [name for name in model._no_split_modules if not name.endswith("Embeddings")]


def shard_whole(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def shard_whole_and_reshard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ in layer_names(model):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_head(model: nn.Module, mesh: DeviceMesh, reshard: bool = False) -> nn.Module:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    fully_shard([embeddings, head] if tied else head, mesh=mesh, reshard_after_forward=reshard)
    return shard_layers(model, mesh)


def shard_by_accelerate(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    # On a CPU, Accelerate takes the plugin for none; what it would do with it on a GPU works there nonetheless.
    accelerator = Accelerator()
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_names(model),
        cpu_ram_efficient_loading=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    try:
        return accelerator.prepare(model, optimizer)[0]
    finally:
        accelerator.free_memory()
        accelerator.state.distributed_type = DistributedType.MULTI_CPU


SHARDING: dict[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {
    "whole": shard_whole,
    "whole, resharded": shard_whole_and_reshard,
    "layers": shard_layers,
    "head": shard_head,
    "head, resharded": functools.partial(shard_head, reshard=True),
    "Accelerate": shard_by_accelerate,
}
OF_FIRST_VERSION = ("bert", "gpt2")
WITH_LORA = "llama with LoRA"
OF_HEADS = ("whole", "whole, resharded", "head", "head, resharded")

# OPT's decoder layers are extended themselves, for their functional dropout. GPT-2's head is tied, Llama's is not.
MODELS = ("bert", "vit", "opt", "gpt2", "llama")
CASES = [
    *((name, "layers", "balanced") for name in MODELS),
    *((name, "Accelerate", config) for name in MODELS for config in ("lossless", "balanced")),
    *((name, sharding, "lossless") for name in ("gpt2", "llama") for sharding in OF_HEADS),
    *((WITH_LORA, sharding, config) for sharding in ("layers", "Accelerate") for config in ("balanced", "compact")),
    *((name, "layers", "compact") for name in MODELS),
    *(("falcon", sharding, config) for sharding in ("layers", "Accelerate") for config in ("lossless", "balanced")),
]


def fresh(name: str) -> tuple[PreTrainedModel, Batch]:
    torch.manual_seed(0)  # the same weights and the same batch on every rank
    model, batch = make(name.removesuffix(" with LoRA"))
    model.config.use_cache = False
    if name == WITH_LORA:
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    batch = {key: four_items(value) for key, value in batch.items() if key != "attention_mask"}
    return model, {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}


class Held:
    """A saved tensor; it lives as long as the graph that has it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def saved_for_backward(forward: Callable[[], Any]) -> tuple[Any, int]:
    """What `forward` returns, and the bytes that are held for its backward, without parameters (gathered or not)."""
    held: list[weakref.ref[Held]] = []

    def pack(x: Tensor) -> Held:
        note = Held(x.detach())  # with its graph, an operator's own output would never be let go
        if not isinstance(x, nn.Parameter) and not isinstance(x._base, nn.Parameter):
            held.append(weakref.ref(note))
        return note

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda note: note.x):
        result = forward()
    storages = {note().x.untyped_storage() for note in held if note() is not None}
    return result, sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.requires_grad}


def case(name: str, sharding: str, config: str, rank: int, ranks: int, mesh: DeviceMesh) -> dict[str, Any]:
    model, batch = fresh(name)
    alone = get_razor_model(copy.deepcopy(model), RazorConfig.preset(config))
    loss = alone(**batch).loss
    loss.backward()
    expected = {key: p.grad for key, p in alone.named_parameters() if p.requires_grad}
    share = ITEMS // ranks
    own = {key: value[rank * share : (rank + 1) * share] for key, value in batch.items()}
    _, saved_alone = saved_for_backward(lambda: alone(**own))

    sharded = SHARDING[sharding](get_razor_model(model, RazorConfig.preset(config)), mesh)
    output, saved = saved_for_backward(lambda: sharded(**own))
    logits = output.logits
    lazy = isinstance(logits, LazyLogits) and not logits._elements.there
    output.loss.backward()
    found = full_gradients(sharded)
    mean_loss = output.loss.detach()
    torch.distributed.all_reduce(mean_loss)

    # Another step: the weights have moved, and are gathered anew.
    torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    after = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    sharded.zero_grad()
    sharded(**own).loss.backward()
    return {
        "loss": loss.item(),
        "mean_loss": mean_loss.item() / ranks,
        "difference": max((found[key] - grad).abs().max().item() for key, grad in expected.items()),
        "largest": max(grad.abs().max().item() for grad in expected.values()),
        "cosine": cosine_similarity(
            *(torch.cat([grads[key].flatten() for key in expected]).double() for grads in (found, expected)), dim=0
        ).item(),
        "lazy": lazy,
        "saved": saved,
        "saved_alone": saved_alone,
        "same_keys": list(after) == list(alone.state_dict()),
        "weights_differ": max((after[key] - value).abs().max().item() for key, value in alone.state_dict().items()),
        "second_gradient": sum(gradient.abs().sum().item() for gradient in full_gradients(sharded).values()),
    }


def first_version(name: str, rank: int, ranks: int) -> dict[str, Any]:
    """FSDP as it was before `fully_shard`, with layers wrapped in modules of its own."""
    model, batch = fresh(name)
    alone = get_razor_model(copy.deepcopy(model), RazorConfig.preset("lossless"))
    alone(**batch).loss.backward()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    get_razor_model(model, RazorConfig.preset("lossless"))
    wrapped = {type(module) for module in model.modules() if type(module).__name__ in layer_names(model)}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=wrapped)
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    share = ITEMS // ranks
    output = sharded(**{key: value[rank * share : (rank + 1) * share] for key, value in batch.items()})
    lazy = isinstance(output.logits, LazyLogits) and not output.logits._elements.there
    output.loss.backward()
    torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
        after = sharded.state_dict()
    differ = max((after[key] - value).abs().max().item() for key, value in alone.state_dict().items())
    return {"lazy": lazy, "weights_differ": differ}


def logits_of_sharded_weights(mesh: DeviceMesh) -> dict[str, str]:
    """What is said to who asks for logits that can no longer be computed, or computes a loss of them."""
    found = {}
    model, batch = fresh("llama")
    sharded = shard_whole_and_reshard(get_razor_model(model), mesh)
    logits = sharded(input_ids=batch["input_ids"]).logits
    for label, ask in {
        "loss": lambda: nn.functional.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1)),
        "logits": lambda: logits.sum(),
    }.items():
        try:
            ask()
        except RuntimeError as error:
            found[label] = str(error)
    return found


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mesh = init_device_mesh("cpu", (ranks,))
    found = {"processes": ranks, "errors": logits_of_sharded_weights(mesh)}
    for name, sharding, config in CASES:
        found[f"{name}, {sharding}, {config}"] = case(name, sharding, config, rank, ranks, mesh)
    for name in OF_FIRST_VERSION:
        found[f"{name}, FSDP1"] = first_version(name, rank, ranks)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_worker(main)
