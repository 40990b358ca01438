"""Where the memory goes: measured, and known beforehand."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, make
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.opt import modeling_opt

from hf_backrazor import (
    RazorConfig,
    estimate,
    estimate_saved_bytes,
    estimate_step_memory,
    get_razor_model,
    measure_saved_bytes,
)
from hf_backrazor.kernels.library import torch_only
from hf_backrazor.live_memory import LiveMemory
from hf_backrazor.packing.bits import byte_table
from hf_backrazor.shapes_only import ShapesOnly, turns

PRESETS = {"dense": None, "balanced": RazorConfig(), "paper": RazorConfig.preset("paper")}


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "bert", "gpt2", "llama", "gemma", "opt", "t5"])
def test_estimate_is_what_is_measured(name: str, config: RazorConfig | None) -> None:
    model, batch = make(name)
    if name == "opt" and "self.training and self.layerdrop" not in inspect.getsource(modeling_opt):
        pytest.skip("this Transformers compares random numbers, which an estimate has none of, to leave layers out")
    batch.pop("attention_mask", None)
    if config is not None:
        get_razor_model(model, config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    estimated = estimate_saved_bytes(model.eval(), tuple(batch[model.main_input_name].shape))
    assert not model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert estimated == measure_saved_bytes(model, **batch)
    # What an estimate leaves behind must not be met by real tensors.
    model.train()(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize(
    ("name", "preset"),
    [*((name, "balanced") for name in ARCHITECTURES), *((name, "lossless") for name in ("bert", "llama", "t5"))],
)
def test_what_a_graph_keeps_alive_is_counted(name: str, preset: str) -> None:
    model, batch = make(name, "eager")
    model = get_razor_model(model.train(), RazorConfig.preset(preset))
    counted = measure_saved_bytes(model, **batch).total
    tensors = [x for x in batch.values() if isinstance(x, torch.Tensor)]
    loss = model(**batch).loss  # fills caches
    del loss
    with LiveMemory([*model.parameters(), *model.buffers(), *tensors]) as memory:
        loss = model(**batch).loss
        alive = memory.live
    # Beside what is saved: the loss, constants of resizing, the last norm's gamma and beta.
    assert alive <= 1.03 * counted + 256
    loss.backward()


def test_what_a_forward_saves_and_drops_is_not_counted() -> None:
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                self.layer(x * 2).exp()  # saved, and gone with its graph
            return self.second(self.layer(x * 2))

    # The two inputs of the layers; what was dropped before may have lain where they lie.
    assert measure_saved_bytes(Dropping(), x=torch.randn(8, 64)).total == 2 * 8 * 64 * 4


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_of_sparse_tensors_indices_and_values_are_counted(layout: torch.layout) -> None:
    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(64, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_sparse(layout=layout) @ self.weight

    x = torch.eye(64)
    # torch's columns are a view of rows and columns.
    indices = {torch.sparse_coo: 2 * 64, torch.sparse_csr: 2 * 64 + 65}[layout]
    assert measure_saved_bytes(Sparse(), x=x).total == 8 * indices + 4 * 64
    with LiveMemory() as memory:
        sparse = x.to_sparse(layout=layout)
        assert memory.live >= 8 * indices + 4 * 64
    del sparse
    assert memory.live == 0


def test_estimate_of_a_model_without_memory_for_its_weights() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=768, n_layer=2, n_head=12, use_cache=False))
    real = GPT2LMHeadModel(GPT2Config(n_embd=768, n_layer=2, n_head=12, use_cache=False))
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    for config in (None, RazorConfig()):
        if config is not None:
            model, real = get_razor_model(model, config), get_razor_model(real, config)
        expected = measure_saved_bytes(real, input_ids=tokens, labels=tokens)
        assert estimate_saved_bytes(model, (2, 64)) == expected
    without_loss = estimate_saved_bytes(model, {"input_ids": (2, 64)}, labels=False)
    assert without_loss.total < expected.total


def test_estimate_of_a_model_with_adapters() -> None:
    model, batch = make("gpt2")
    batch.pop("attention_mask", None)
    model = get_razor_model(get_peft_model(model, LoraConfig(r=4)))
    assert estimate_saved_bytes(model, tuple(batch["input_ids"].shape)) == measure_saved_bytes(model, **batch)


def test_a_model_trains_after_it_was_estimated_on_fake_tensors() -> None:
    """Nothing fake is left behind, such as tables that are made once."""
    model, batch = make("bert")
    get_razor_model(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    with torch_only():
        byte_table.cache_clear()
        estimate_step_memory(model, shapes)
        model(**batch).loss.backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters() if p.grad is not None)


def test_an_unknown_input_is_named() -> None:
    model, _ = make("bert")
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no input 'pixels': .*input_ids"):
        estimate_saved_bytes(model, {"pixels": (2, 3)})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_saved_bytes_grow_linearly_with_the_sequence(name: str) -> None:
    with torch.device("meta"):
        if name == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_positions=4096, n_layer=2, use_cache=False))
        else:
            sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096, use_cache=False))
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    get_razor_model(model)
    sizes = {length: estimate_saved_bytes(model, (1, length)).total for length in (512, 1024, 2048, 4096)}
    for length in (512, 1024, 2048):
        assert sizes[2 * length] / sizes[length] == pytest.approx(2, rel=0.02)
    growth = estimate_saved_bytes(dense, (1, 4096)).total / estimate_saved_bytes(dense, (1, 512)).total
    assert growth > 10


def test_report_counts_bits_for_each_element_that_dense_training_saves() -> None:
    model, batch = make("bert")
    report = get_razor_model(model).memory_report(**batch)
    kinds = report.to_dict()["by_kind"]
    assert kinds["dropout"]["bits_per_element"] == pytest.approx(1, abs=0.1)  # in place of a byte or a float
    # They read what the norms and the activation functions save; but for the pooler and the classifier.
    linear = [row for row in report.modules if row.kind == "linear" and "encoder" in row.name]
    bits = 8 * sum(row.razor_bytes for row in linear) / sum(row.elements for row in linear)
    assert bits < kinds["norm"]["bits_per_element"]
    for row in report.modules:
        if row.elements:
            assert row.bits_per_element == 8 * row.razor_bytes / row.elements
    assert "bits/element" in str(report)


# In these shapes, what is taken in slices is taken in many.
LARGE = {"llama": (4, 8192), "bert": (128, 512), "resnet": (64, 3, 224, 224), "segformer": (8, 3, 512, 512)}
LARGE_CASES = [
    *((name, "balanced", True) for name in LARGE),
    *(("llama", preset, True) for preset in ("lossless", "paper")),
    # In operators of torch, which are slow to run on fake tensors, rows and maps.
    *((name, "balanced", False) for name in ("llama", "resnet")),
]


def large(name: str, preset: str) -> nn.Module:
    model, _ = make(name)
    if name in ("llama", "bert"):
        model.config.max_position_embeddings = 8192
        with torch.device("meta"):
            model = type(model)(model.config)
    return get_razor_model(model.train(), RazorConfig.preset(preset))


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize(("name", "preset", "compiled"), LARGE_CASES)
def test_an_estimate_does_not_run_every_slice(monkeypatch, name: str, preset: str, compiled: bool) -> None:
    model, shape = large(name, preset), LARGE[name]
    called = 0

    class Counting(ShapesOnly):
        def dispatch(self, *args: Any) -> Any:
            nonlocal called
            called += 1
            return super().dispatch(*args)

    monkeypatch.setattr(estimate, "ShapesOnly", Counting)
    counts = []
    with nullcontext() if compiled else torch_only():
        estimate_step_memory(model, shape)  # constants that are made once
        for larger in (4, 16):
            called = 0
            estimate_step_memory(model, (shape[0] * larger, *shape[1:]))
            counts.append(called)
    # Small tensors get their second slice. With all slices there would be two to three times as many.
    assert counts[1] <= 1.15 * counts[0]


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize(("name", "preset", "compiled"), LARGE_CASES)
def test_the_slices_that_an_estimate_runs_show_what_all_do(monkeypatch, name: str, preset: str, compiled: bool) -> None:
    model, shape = large(name, preset), LARGE[name]
    with nullcontext() if compiled else torch_only():
        estimate_step_memory(model, shape)  # constants that are made once
        short = estimate_step_memory(model, shape), estimate_saved_bytes(model, shape)
        monkeypatch.setattr(estimate, "ShapesOnly", FakeTensorMode)  # which runs them all
        step, saved = estimate_step_memory(model, shape), estimate_saved_bytes(model, shape)
        assert saved == short[1]
        # What a last, shorter slice needs besides may come and go at another time.
        assert dataclasses.replace(step, step=0) == dataclasses.replace(short[0], step=0)
        assert step.step == pytest.approx(short[0].step, rel=1e-4)


def test_other_fake_tensors_are_not_an_estimates() -> None:
    # A compiler that traced two slices would compute no others.
    with ShapesOnly():
        assert list(turns(range(5), torch.empty(5))) == [0, 1]
    with FakeTensorMode():
        assert list(turns(range(5), torch.empty(5))) == [0, 1, 2, 3, 4]
    assert list(turns(range(5), torch.empty(5))) == [0, 1, 2, 3, 4]


PEAK = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from peak_memory import peak_over_idle, return_freed_memory
return_freed_memory()
import torch
from transformers import BertConfig, BertForSequenceClassification
from hf_backrazor import estimate_step_memory, get_razor_model
size = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 4}
model = BertForSequenceClassification(BertConfig(vocab_size=2000, **size)).train()
if sys.argv[2] == "razor":
    get_razor_model(model)
elif sys.argv[2] == "checkpointing":
    model.gradient_checkpointing_enable()
batch = {"input_ids": torch.randint(2000, (8, 256)), "labels": torch.randint(2, (8,))}

def step():
    model(**batch).loss.backward()
    model.zero_grad()

step()
print(estimate_step_memory(model, (8, 256)).step / 2**20, peak_over_idle(step))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize("way", ["dense", "checkpointing", "razor"])
def test_step_memory_is_the_peak_of_a_real_step(way: str) -> None:
    recipes = Path(__file__).parent.parent / "recipes"
    run = subprocess.run([sys.executable, "-c", PEAK, recipes, way], capture_output=True, text=True, check=True)
    estimated, measured = map(float, run.stdout.split())
    # Beside the tensors there are threads' buffers of matrix products.
    assert estimated == pytest.approx(measured, rel=0.1, abs=15)


def test_step_memory_counts_weights_and_the_optimizers_states() -> None:
    model, batch = make("gpt2")
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    size = sum(p.nbytes for p in model.parameters())
    memory = estimate_step_memory(model, shapes)
    assert memory.optimizer == 2 * size
    assert memory.weights >= size
    assert memory.total == memory.weights + memory.optimizer + memory.step
    assert memory.step >= size  # gradients at least
    assert estimate_step_memory(model, shapes, optimizer_states=0).optimizer == 0
    lora = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    trained = sum(p.nbytes for p in lora.parameters() if p.requires_grad)
    assert estimate_step_memory(lora, shapes).optimizer == 2 * trained


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "resnet"])
@pytest.mark.parametrize("way", ["dense", "checkpointing", "balanced"])
def test_step_memory_counts_what_is_saved(name: str, way: str) -> None:
    model, batch = make(name)
    batch.pop("attention_mask", None)
    if way == "checkpointing" and not model.supports_gradient_checkpointing:
        pytest.skip("has no activation checkpointing")
    if way == "checkpointing":
        model.config.use_cache = False
        model.gradient_checkpointing_enable()
    elif way != "dense":
        get_razor_model(model, RazorConfig.preset(way))
    shapes = {key: tuple(x.shape) for key, x in batch.items()}
    memory = estimate_step_memory(model, shapes)
    # A second forward, in backward, saves nothing for it.
    assert memory.saved == estimate_saved_bytes(model, shapes).total == measure_saved_bytes(model, **batch).total
    assert memory.saved <= memory.step


def test_step_memory_needs_a_loss() -> None:
    model, batch = make("bert")
    with pytest.raises(ValueError, match="BertModel computes no loss"):
        estimate_step_memory(model.bert, tuple(batch["input_ids"].shape))
