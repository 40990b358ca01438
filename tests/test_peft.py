"""PEFT: adapters before razor, adapters after razor, saving, merging."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from architectures import Batch, make
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_backrazor import RazorConfig, RazorModel, get_razor_model
from hf_backrazor.config import RAZOR_CONFIG_NAME
from hf_backrazor.modules import RazorLinear, RazorModule

peft = pytest.importorskip("peft")


TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "vit": None}


def lora_config(name: str, **changes: object) -> peft.LoraConfig:
    settings = {"r": 4, "lora_dropout": 0.1, "target_modules": TARGETS[name], "task_type": TASKS[name]}
    if name == "gpt2":
        settings["fan_in_fan_out"] = True
    return peft.LoraConfig(**{**settings, **changes})


def with_lora(model: PreTrainedModel, name: str, **changes: object) -> peft.PeftModel:
    """The model with adapters as they are after some training: B is not zero."""
    adapted = peft.get_peft_model(model, lora_config(name, **changes))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return adapted


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients of one training step with a fixed seed."""
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**batch)
    output.loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), gradients


def logits(model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([gradients[key].flatten() for key in expected]) for gradients in (found, expected)]
    return nn.functional.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("name", TARGETS)
def test_lora_then_razor(name: str) -> None:
    model, batch = make(name)
    adapted = with_lora(model, name)
    plain_type, keys = type(adapted), list(adapted.state_dict())
    trained = {key for key, p in adapted.named_parameters() if p.requires_grad}
    loss, expected, gradients = step(copy.deepcopy(adapted), batch)
    assert gradients.keys() == trained  # the adapters, and a classifier where the task has one

    for config in (RazorConfig.preset("lossless"), RazorConfig.preset("paper"), RazorConfig()):
        razor = get_razor_model(adapted, config)
        assert razor is adapted
        assert isinstance(razor, plain_type)
        assert isinstance(razor, peft.PeftModel)
        assert isinstance(razor, RazorModel)
        assert list(razor.state_dict()) == keys
        assert {key for key, p in razor.named_parameters() if p.requires_grad} == trained
        razor_loss, found, razor_gradients = step(razor, batch)
        torch.testing.assert_close(razor_loss, loss)  # language models': up to the order of summation
        assert torch.equal(found, expected)
        assert razor_gradients.keys() == trained
        if config.sparsity == 0:
            for key in trained:
                torch.testing.assert_close(razor_gradients[key], gradients[key], rtol=1e-3, atol=1e-6)
        else:
            assert cosine(razor_gradients, gradients) > 0.5
        assert razor.unload() is adapted
        assert type(adapted) is plain_type
        assert not any(isinstance(module, RazorModule) for module in adapted.modules())


@pytest.mark.parametrize("name", TARGETS)
def test_frozen_weights_save_no_inputs_and_adapters_save_packed_ones(name: str) -> None:
    model, batch = make(name)
    razor = get_razor_model(with_lora(model, name))
    frozen = {
        key
        for key, module in razor.razor_modules()
        if isinstance(module, RazorLinear) and not module.weight.requires_grad
    }
    assert any(key.endswith("base_layer") for key in frozen)
    report = razor.memory_report(**batch)
    rows = {row.name: row for row in report.modules}
    assert sum(rows[key].razor_bytes for key in frozen if key in rows) == 0

    adapters = [rows[key] for key in rows if ".lora_A." in key or ".lora_B." in key]
    assert sum(row.dense_bytes for row in adapters) > 0
    assert sum(row.razor_bytes for row in adapters) < 0.5 * sum(row.dense_bytes for row in adapters)
    assert report.razor_bytes < 0.5 * report.dense_bytes


def test_without_dropout_adapters_share_one_copy_of_an_input() -> None:
    model, batch = make("llama")
    razor = get_razor_model(with_lora(model, "llama", lora_dropout=0.0))
    rows = {row.name: row.razor_bytes for row in razor.memory_report(**batch).modules}

    def saved(target: str) -> int:
        # r numbers a token are so few that what A saves is nearly all its own input. Not in layer 0: what comes from
        # frozen embeddings is outside of the graph, where a packed copy could not be known to be fresh.
        return sum(size for key, size in rows.items() if f"layers.1.{target}.lora_A" in key)

    assert saved("self_attn.q_proj") > 0
    assert saved("self_attn.v_proj") == 0
    assert saved("mlp.gate_proj") > 0
    assert saved("mlp.up_proj") == 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_adapter_alone_is_saved_and_loads_into_a_plain_model(name: str, tmp_path: Path) -> None:
    model, batch = make(name)
    base = copy.deepcopy(model)
    adapted = with_lora(model, name)
    adapted.save_pretrained(tmp_path / "dense")
    razor = get_razor_model(adapted, RazorConfig.preset("paper", sparsity=0.8))
    razor.save_pretrained(tmp_path / "razor")

    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "razor").iterdir()} == names | {RAZOR_CONFIG_NAME}
    weights = "adapter_model.safetensors"
    assert (tmp_path / "razor" / weights).read_bytes() == (tmp_path / "dense" / weights).read_bytes()
    settings = [json.loads((tmp_path / kind / "adapter_config.json").read_text()) for kind in ("dense", "razor")]
    assert settings[0] == settings[1]
    assert RazorConfig.from_pretrained(tmp_path / "razor") == razor.razor_config

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "razor", is_trainable=True)
    assert not isinstance(loaded, RazorModel)
    assert torch.equal(logits(loaded, batch), logits(razor, batch))
    again = get_razor_model(loaded, RazorConfig.from_pretrained(tmp_path / "razor"))
    _, _, expected = step(razor, batch)
    _, _, found = step(again, batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_razor_then_lora(name: str) -> None:
    model, batch = make(name)
    torch.manual_seed(1)
    expected_loss, expected, gradients = step(with_lora(copy.deepcopy(model), name), batch)
    torch.manual_seed(1)
    adapted = with_lora(get_razor_model(model, RazorConfig.preset("lossless")), name)
    assert isinstance(adapted, peft.PeftModel)
    assert isinstance(adapted.get_base_model(), RazorModel)
    base_layers = [module for key, module in adapted.named_modules() if key.endswith("base_layer")]
    assert base_layers
    assert all(isinstance(module, RazorModule) for module in base_layers)

    loss, found, razor_gradients = step(adapted, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)  # GPT-2 sums its loss in another order
    assert torch.equal(found, expected)
    assert razor_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(razor_gradients[key], gradient, rtol=1e-3, atol=1e-6)

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(step(adapted, batch)[0].item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_merge_and_unload_after_razor(name: str) -> None:
    model, batch = make(name)
    plain_type, keys = type(model), list(model.state_dict())
    adapted = with_lora(model, name)
    expected = copy.deepcopy(adapted).merge_and_unload()
    adapted_logits = logits(adapted, batch)
    merged = get_razor_model(adapted).merge_and_unload()
    assert isinstance(merged, plain_type)
    assert list(merged.state_dict()) == keys
    weights, expected_weights = merged.state_dict(), expected.state_dict()
    assert all(torch.equal(weights[key], expected_weights[key]) for key in keys)
    assert torch.equal(logits(merged, batch), logits(expected, batch))
    torch.testing.assert_close(logits(merged, batch), adapted_logits, rtol=1e-4, atol=1e-5)


def test_a_merged_model_can_go_on_as_a_plain_or_razor_model() -> None:
    model, batch = make("bert")
    merged = get_razor_model(with_lora(model, "bert")).merge_and_unload().requires_grad_(True)
    dense = copy.deepcopy(merged)
    if isinstance(dense, RazorModel):
        dense.unload()
    assert not any(isinstance(module, RazorModule) for module in dense.modules())
    razor = merged if isinstance(merged, RazorModel) else get_razor_model(merged)
    assert sum(isinstance(module, RazorLinear) for _, module in razor.razor_modules()) > 6
    assert torch.equal(step(razor, batch)[0], step(dense, batch)[0])


def test_razor_then_lora_then_razor_packs_adapters_or_is_refused() -> None:
    model, _ = make("bert")
    adapted = with_lora(get_razor_model(model), "bert")
    expected = {key: type(module) for key, module in adapted.named_modules()}
    try:
        get_razor_model(adapted)
    except ValueError:
        assert {key: type(module) for key, module in adapted.named_modules()} == expected
        return
    adapters = [module for key, module in adapted.named_modules() if key.endswith("lora_A.default")]
    assert adapters
    assert all(isinstance(module, RazorLinear) for module in adapters)
    adapted.unload()
    assert not any(isinstance(module, (RazorModule, RazorModel)) for module in adapted.modules())


def test_disabled_adapter_and_several_adapters() -> None:
    model, batch = make("bert")
    base = logits(model, batch)
    razor = get_razor_model(with_lora(model, "bert", lora_dropout=0.0))
    with razor.disable_adapter():
        # The classifier is trained in full and has a copy of the original, which is used here.
        assert torch.equal(logits(razor, batch), base)
    first = logits(razor, batch)
    assert not torch.equal(first, base)

    razor.add_adapter("second", lora_config("bert", r=2))
    razor.set_adapter("second")
    loss, found, gradients = step(razor, batch)
    assert gradients
    assert all(".second." in key for key in gradients)
    plain = razor.unload()
    expected_loss, expected, _ = step(plain, batch)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(found, expected)


def test_trainer_saves_and_resumes_adapters(tmp_path: Path) -> None:
    def trained(folder: Path, resume: str | None = None) -> tuple[peft.PeftModel, Trainer]:
        torch.manual_seed(0)
        model, batch = make("gpt2")
        razor = get_razor_model(with_lora(model, "gpt2"))
        rows = [{key: value[i] for key, value in batch.items()} for i in range(3)] * 4
        arguments = TrainingArguments(
            folder, max_steps=4, save_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(razor, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return razor, trainer

    whole, _ = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    assert RazorConfig.from_pretrained(checkpoint) == whole.razor_config
    resumed, trainer = trained(tmp_path / "resumed", str(checkpoint))
    assert trainer.state.global_step == 4
    assert isinstance(resumed, RazorModel)
    for (key, value), (_, expected) in zip(resumed.state_dict().items(), whole.state_dict().items(), strict=True):
        assert torch.equal(value, expected), key
