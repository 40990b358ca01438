"""PEFT: adapters before razor, adapters after razor, saving, merging, switching."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import Batch, make
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_backrazor import RazorConfig, RazorModel, get_razor_model, measure_saved_bytes
from hf_backrazor.config import RAZOR_CONFIG_NAME
from hf_backrazor.functional.scaling import scaling
from hf_backrazor.modules import RazorLinear, RazorLMHead, RazorModule, RazorRecomputed
from hf_backrazor.packing import PackSpec

peft = pytest.importorskip("peft")

MODELS = ("bert", "gpt2", "llama", "vit")
METHODS = ("lora", "rslora", "dora", "ia3", "ln_tuning")
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "vit": None}
TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}
# What IA3 multiplies the output of, and what the input.
SCALED = {
    "bert": (["key", "value"], ["output.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "vit": (["k_proj", "v_proj"], ["fc2"]),
}
NORMS = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
}


def adapter_config(method: str, name: str, **changes: object) -> peft.PeftConfig:
    settings = {"task_type": TASKS[name]}
    if method == "ln_tuning":
        return peft.LNTuningConfig(**{**settings, "target_modules": NORMS[name], **changes})
    settings["fan_in_fan_out"] = name == "gpt2"
    if method == "ia3":
        outputs, inputs = SCALED[name]
        settings |= {"target_modules": outputs + inputs, "feedforward_modules": inputs}
        return peft.IA3Config(**{**settings, **changes})
    settings |= {"r": 4, "lora_dropout": 0.1, "target_modules": TARGETS[name]}
    settings |= {"use_dora": method == "dora", "use_rslora": method == "rslora"}
    return peft.LoraConfig(**{**settings, **changes})


def with_adapter(model: PreTrainedModel, name: str, method: str = "lora", **changes: object) -> peft.PeftModel:
    """The model with adapters as they are after some training: no longer without effect."""
    adapted = peft.get_peft_model(model, adapter_config(method, name, **changes))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
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


def assert_same_step(found: nn.Module, expected: nn.Module, batch: Batch) -> None:
    """The forward to the bit, and gradients up to the order of summation."""
    expected_loss, expected_logits, expected_gradients = step(expected, batch)
    loss, found_logits, gradients = step(found, batch)
    torch.testing.assert_close(loss, expected_loss)  # language models': up to the order of summation
    assert torch.equal(found_logits, expected_logits)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert list(found.state_dict()) == list(state)
    for key, value in found.state_dict().items():
        assert torch.equal(value, state[key]), key


# Adapters, then razor


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_then_razor(method: str, name: str) -> None:
    model, batch = make(name)
    adapted = with_adapter(model, name, method)
    plain, plain_type, keys = copy.deepcopy(adapted), type(adapted), list(adapted.state_dict())
    trained = {key for key, p in adapted.named_parameters() if p.requires_grad}
    loss, expected, gradients = step(plain, batch)
    assert gradients.keys() == trained  # the adapters, and a classifier where the task has one

    for config, least in ((RazorConfig.preset("paper"), 0.3), (RazorConfig(), 0.8), (RazorConfig.preset("fast"), 0.8)):
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
        assert least < cosine(razor_gradients, gradients)
        # Not quite that of dense training: IA3's classifier, whose input is kept whole, has nearly all of the gradient.
        assert any(not torch.equal(razor_gradients[key], gradients[key]) for key in trained)
        assert razor.remove_razor() is adapted
        assert type(adapted) is plain_type
        assert not any(isinstance(module, RazorModule) for module in adapted.modules())
    assert_same_step(get_razor_model(adapted, RazorConfig.preset("lossless")), plain, batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_save_no_inputs_and_adapters_save_packed_ones(method: str, name: str) -> None:
    model, batch = make(name)
    model.config.use_cache = False
    razor = get_razor_model(with_adapter(model, name, method))
    frozen = {
        key
        for key, module in razor.razor_modules()
        if isinstance(module, RazorLinear) and not module.weight.requires_grad
    }
    assert any(".layers.0." in key or ".layer.0." in key or ".h.0." in key for key in frozen)
    report = razor.memory_report(**batch)
    rows = {row.name: row for row in report.modules}
    assert sum(rows[key].razor_bytes for key in frozen if key in rows) == 0
    assert report.razor_bytes < 0.5 * report.dense_bytes

    of_adapters = {
        "ia3": lambda key: key.endswith((*SCALED[name][0], *SCALED[name][1])),
        "ln_tuning": lambda key: ".ln_tuning_layers." in key,
    }.get(method, lambda key: ".lora_A." in key or ".lora_B." in key)
    adapters = [row for key, row in rows.items() if of_adapters(key)]
    assert sum(row.dense_bytes for row in adapters) > 0
    assert sum(row.razor_bytes for row in adapters) < 0.5 * sum(row.dense_bytes for row in adapters)


def test_without_dropout_adapters_share_one_copy_of_an_input() -> None:
    model, batch = make("llama")
    razor = get_razor_model(with_adapter(model, "llama", lora_dropout=0.0))
    rows = {row.name: row.razor_bytes for row in razor.memory_report(**batch).modules}

    def saved(target: str) -> int:
        # r numbers a token are so few that what A saves is nearly all its own input. Not in layer 0: what comes from
        # frozen embeddings is outside of the graph, where a packed copy could not be known to be fresh.
        return sum(size for key, size in rows.items() if f"layers.1.{target}.lora_A" in key)

    assert saved("self_attn.q_proj") > 0
    assert saved("self_attn.v_proj") == 0
    assert saved("mlp.gate_proj") > 0
    assert saved("mlp.up_proj") == 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_wide_adapters_of_a_16_bit_model_save_no_more(name: str, dropout: float) -> None:
    model, batch = make(name)
    batch = {key: x.bfloat16() if x.is_floating_point() else x for key, x in batch.items()}
    saved, found = [], []
    for wide in (True, False):
        adapted = with_adapter(copy.deepcopy(model).bfloat16(), name, lora_dropout=dropout)
        adapted = adapted if wide else adapted.bfloat16()
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape).bfloat16().to(parameter.dtype) * 0.1
        if wide:
            expected = step(adapted, batch)
        saved.append(measure_saved_bytes(get_razor_model(adapted), **batch).total)
        found.append(step(adapted, batch))
    assert saved[0] == pytest.approx(saved[1], rel=0.02)  # what is not packed, as a classifier's input
    assert torch.equal(found[0][1], expected[1])
    assert cosine(found[0][2], expected[2]) > 0.97


@pytest.mark.parametrize("name", MODELS)
def test_autocast_leaves_no_copy_of_a_frozen_weight(name: str) -> None:
    model, batch = make(name)
    adapted = with_adapter(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(adapted, batch)
        get_razor_model(adapted, RazorConfig.preset("lossless"))
        found = step(adapted, batch)
        rows = adapted.memory_report(**batch).modules
    assert torch.equal(found[1], expected[1])
    assert cosine(found[2], expected[2]) > 0.9999
    of_bases = [row for row in rows if row.name.endswith("base_layer")]
    assert sum(row.dense_bytes for row in of_bases) > 0
    assert sum(row.razor_bytes for row in of_bases) == 0


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_what_a_trained_vector_is_multiplied_with_is_packed(method: str) -> None:
    model, batch = make("vit")
    razor = get_razor_model(with_adapter(model, "vit", method))
    rows = {row.name: row for row in razor.memory_report(**batch).modules}
    vectors = {
        "dora": [key for key, _ in razor.named_modules() if key.endswith("lora_magnitude_vector.default")],
        "ia3": [key for key, module in razor.named_modules() if hasattr(module, "ia3_l")],
    }[method]
    assert len(vectors) == {"dora": 8, "ia3": 6}[method]
    for key in vectors:
        # Not that of layer 0's query in DoRA, say: a row is absent only if nothing is saved there at all.
        assert rows[key].kind in ("inline", "adapter")
        assert 0 < rows[key].razor_bytes < 0.2 * rows[key].dense_bytes


# Razor, then adapters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_razor_then_adapter(method: str, name: str) -> None:
    model, batch = make(name)
    torch.manual_seed(1)
    plain = with_adapter(copy.deepcopy(model), name, method)
    torch.manual_seed(1)
    adapted = with_adapter(get_razor_model(model, RazorConfig.preset("lossless")), name, method)
    assert isinstance(adapted, peft.PeftModel)
    assert isinstance(adapted.get_base_model(), RazorModel)
    base_layers = [module for key, module in adapted.named_modules() if key.endswith("base_layer")]
    assert base_layers
    assert all(isinstance(module, RazorModule) for module in base_layers)
    assert_same_step(adapted, plain, batch)


@pytest.mark.parametrize("preset", ["balanced", "compact"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_come_later_are_packed_as_those_that_were_there(method: str, name: str, preset: str) -> None:
    model, batch = make(name)
    config = RazorConfig.preset(preset)
    torch.manual_seed(1)
    before = get_razor_model(with_adapter(copy.deepcopy(model), name, method), config)
    torch.manual_seed(1)
    after = with_adapter(get_razor_model(model, config), name, method)
    after.train()
    kinds = {key: type(module).__name__ for key, module in before.base_model.named_modules()}
    assert {key: type(module).__name__ for key, module in after.base_model.named_modules()} == kinds
    assert measure_saved_bytes(after, **batch).total == measure_saved_bytes(before, **batch).total


def test_adapters_come_and_go() -> None:
    # Transformers' own way, without a PeftModel around the model.
    model, batch = make("llama")
    config = RazorConfig.preset("lossless", overrides={r".*\.(lora_A\..*|q_proj)": {"sparsity": 0.98}})
    plain_logits = logits(model, batch)
    razor = get_razor_model(model, config)
    razor.add_adapter(adapter_config("lora", "llama"), "first")
    razor.train()
    assert {module.razor_config.sparsity for key, module in razor.razor_modules() if ".lora_A." in key} == {0.98}
    razor.add_adapter(adapter_config("lora", "llama", target_modules=["o_proj"]), "second")
    razor.train()
    assert len([key for key, _ in razor.razor_modules() if key.endswith("lora_A.second")]) == 2
    razor.delete_adapter(["first", "second"])
    assert torch.equal(logits(razor, batch), plain_logits)
    razor.train()
    plain = razor.remove_razor()
    assert not any(isinstance(module, (RazorModule, RazorModel)) for module in plain.modules())


def test_adapters_that_are_not_targeted_stay_plain() -> None:
    model, _ = make("llama")
    razor = with_adapter(get_razor_model(model, RazorConfig(exclude_modules=r".*\.lora_[AB]\..*")), "llama")
    razor.train()
    assert not any(isinstance(module, RazorModule) for key, module in razor.named_modules() if ".lora_A." in key)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_adapters_of_a_razor_model_learn(name: str) -> None:
    model, batch = make(name)
    adapted = with_adapter(get_razor_model(model), name)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(step(adapted, batch)[0].item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_razor_then_lora_then_razor_is_refused_and_changes_nothing() -> None:
    model, batch = make("bert")
    adapted = with_adapter(get_razor_model(model), "bert")
    before = {key: type(module) for key, module in adapted.named_modules()}
    with pytest.raises(ValueError, match=r"prepared by `get_razor_model` already; call `remove_razor\(\)`"):
        get_razor_model(adapted)
    assert {key: type(module) for key, module in adapted.named_modules()} == before
    # What the message says to do.
    adapted.get_base_model().remove_razor()
    plain = copy.deepcopy(adapted)
    get_razor_model(adapted, RazorConfig.preset("lossless"))
    assert any(isinstance(module, RazorLinear) for key, module in adapted.named_modules() if ".lora_A." in key)
    assert_same_step(adapted, plain, batch)


# Saving and loading


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_alone_is_saved_and_loads_into_a_plain_model(method: str, name: str, tmp_path: Path) -> None:
    model, batch = make(name)
    base = copy.deepcopy(model)
    adapted = with_adapter(model, name, method)
    adapted.save_pretrained(tmp_path / "dense")
    razor = get_razor_model(adapted, RazorConfig.preset("paper", sparsity=0.8))
    razor.save_pretrained(tmp_path / "razor")

    weights = "adapter_model.safetensors"
    dense_files = {path.name for path in (tmp_path / "dense").iterdir()}
    assert weights in dense_files
    assert "model.safetensors" not in dense_files
    assert {path.name for path in (tmp_path / "razor").iterdir()} == dense_files | {RAZOR_CONFIG_NAME}
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


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_adapter_loads_into_a_razor_model(method: str, tmp_path: Path) -> None:
    model, batch = make("llama")
    base = copy.deepcopy(model)
    adapted = with_adapter(model, "llama", method)
    adapted.save_pretrained(tmp_path)
    onto_razor = peft.PeftModel.from_pretrained(get_razor_model(base), tmp_path)
    assert torch.equal(logits(onto_razor, batch), logits(adapted, batch))


# Merging and unloading


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unload_after_razor(method: str, name: str) -> None:
    model, batch = make(name)
    plain_type = type(model)
    adapted = with_adapter(model, name, method)
    expected = copy.deepcopy(adapted).merge_and_unload()
    adapted_logits = logits(adapted, batch)
    merged = get_razor_model(adapted).merge_and_unload()
    assert isinstance(merged, plain_type)
    assert_same_weights(merged, expected)
    assert torch.equal(logits(merged, batch), logits(expected, batch))
    torch.testing.assert_close(logits(merged, batch), adapted_logits, rtol=1e-4, atol=1e-5)

    # It goes on as a razor model, and as a plain one after `remove_razor`.
    assert isinstance(merged, RazorModel)
    merged.requires_grad_(True)
    dense = copy.deepcopy(merged).remove_razor()
    assert not any(isinstance(module, RazorModule) for module in dense.modules())
    assert sum(isinstance(module, RazorLinear) for _, module in merged.razor_modules()) > 6
    assert torch.equal(step(merged, batch)[1], step(dense, batch)[1])


@pytest.mark.parametrize("method", METHODS)
def test_merging_in_place_and_back(method: str) -> None:
    model, batch = make("llama")
    plain = with_adapter(model, "llama", method)
    razor = get_razor_model(copy.deepcopy(plain))
    adapted_logits = logits(razor, batch)
    for adapted in (plain, razor):
        adapted.merge_adapter()
    assert torch.equal(logits(razor, batch), logits(plain, batch))
    for adapted in (plain, razor):
        adapted.unmerge_adapter()
    assert torch.equal(logits(razor, batch), logits(plain, batch))
    torch.testing.assert_close(logits(razor, batch), adapted_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_and_razor_are_taken_off_apart(method: str) -> None:
    model, batch = make("llama")
    base_logits = logits(model, batch)
    razor = get_razor_model(with_adapter(model, "llama", method))
    # PEFT's takes the adapters off; the razor stays.
    base = copy.deepcopy(razor).unload()
    assert torch.equal(logits(base, batch), base_logits)
    assert isinstance(base, RazorModel)
    assert not any("lora" in key or "ia3" in key or "ln_tuning" in key for key, _ in base.named_parameters())
    # `remove_razor` takes the razor off; the adapters stay.
    plain = razor.remove_razor()
    assert isinstance(plain, peft.PeftModel)
    assert torch.equal(logits(plain.unload(), batch), base_logits)


# Parts that are trained in full


@pytest.mark.parametrize(("name", "module"), [("vit", "classifier"), ("llama", "embed_tokens"), ("bert", "pooler")])
def test_modules_to_save_are_trained_and_saved(name: str, module: str, tmp_path: Path) -> None:
    model, batch = make(name)
    plain = with_adapter(model, name, modules_to_save=[module])
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    assert any(f"{module}.modules_to_save.default" in key for key in step(razor, batch)[2])
    assert_same_step(razor, plain, batch)
    plain.save_pretrained(tmp_path / "dense")
    razor.save_pretrained(tmp_path / "razor")
    saved = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("dense", "razor")]
    assert any(f".{module}." in key for key in saved[0])
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())


@pytest.mark.parametrize("order", ["adapter first", "razor first"])
def test_a_head_that_is_trained_in_full_does_without_logits(order: str) -> None:
    model, batch = make("llama")
    model.config.use_cache = False
    torch.manual_seed(1)
    plain = with_adapter(copy.deepcopy(model), "llama", modules_to_save=["lm_head"])
    torch.manual_seed(1)
    lossless = RazorConfig.preset("lossless")
    if order == "razor first":
        razor = with_adapter(get_razor_model(model, lossless), "llama", modules_to_save=["lm_head"])
    else:
        razor = get_razor_model(with_adapter(model, "llama", modules_to_save=["lm_head"]), lossless)
    head = razor.get_base_model().lm_head
    assert isinstance(head.modules_to_save["default"], RazorLMHead)
    output = razor.train()(**batch)
    assert not output.logits._elements.there  # nor has the loss asked for them
    assert_same_step(razor, plain, batch)


# Several adapters


@pytest.mark.parametrize("method", METHODS)
def test_switching_between_adapters(method: str) -> None:
    model, batch = make("llama")
    plain = with_adapter(model, "llama", method)
    plain.add_adapter("second", adapter_config(method, "llama"))
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if ".second" in key:
                parameter += torch.randn_like(parameter) * 0.1
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    of_each = {}
    for adapter in ("default", "second", "default"):
        for adapted in (plain, razor):
            adapted.set_adapter(adapter)
        assert_same_step(razor, plain, batch)
        gradients = step(razor, batch)[2]
        assert gradients
        assert all(f".{adapter}" in key for key in gradients)
        of_each.setdefault(adapter, logits(razor, batch))
        assert torch.equal(logits(razor, batch), of_each[adapter])
    assert not torch.equal(of_each["default"], of_each["second"])


def test_two_adapters_at_once() -> None:
    model, batch = make("llama")
    plain = with_adapter(model, "llama")
    plain.add_adapter("second", adapter_config("lora", "llama", r=2))
    plain.base_model.set_adapter(["default", "second"])
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    gradients = step(razor, batch)[2]
    assert any(".default." in key for key in gradients)
    assert any(".second." in key for key in gradients)
    assert_same_step(razor, plain, batch)


def test_an_adapter_added_later_works_and_is_packed_once_the_razor_is_put_on_again() -> None:
    model, batch = make("bert")
    razor = get_razor_model(with_adapter(model, "bert", lora_dropout=0.0))
    razor.add_adapter("second", adapter_config("lora", "bert", r=2))
    razor.set_adapter("second")
    loss, found, gradients = step(razor, batch)
    assert gradients
    assert all(".second." in key for key in gradients)

    plain = razor.remove_razor()
    expected_loss, expected, _ = step(plain, batch)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(found, expected)
    again = get_razor_model(plain)
    added = [module for key, module in again.named_modules() if ".lora_" in key and key.endswith(".second")]
    assert added
    assert all(isinstance(module, (RazorModule, nn.Identity)) for module in added)
    again.delete_adapter("default")
    assert torch.equal(step(again, batch)[1], expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_disabled_adapter_has_no_effect_and_saves_nothing(method: str) -> None:
    model, batch = make("bert")
    plain = copy.deepcopy(model).requires_grad_(False)
    razor = get_razor_model(with_adapter(model, "bert", method))
    with_it = logits(razor, batch)
    with razor.disable_adapter():
        # The classifier is trained in full and has a copy of the original, which is used here.
        assert torch.equal(logits(razor, batch), logits(plain, batch))
        razor.train()
        assert razor.memory_report(**batch).razor_bytes == 0
    assert not torch.equal(with_it, logits(plain, batch))
    assert torch.equal(logits(razor, batch), with_it)


def test_adapters_of_a_convolution_come_from_its_class() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    config = peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights=False)
    adapted = get_razor_model(peft.get_peft_model(plain, config), RazorConfig.preset("lossless"))
    adapted.add_adapter("second", config)
    adapted.set_adapter("second")
    layer = adapted.base_model.model[2]
    assert type(layer.lora_A["second"]) is nn.Conv2d
    for _ in range(2):  # as it came, and with its operator
        x = torch.randn(2, 3, 9, 9)
        output = adapted(x)
        dense = copy.deepcopy(adapted).remove_razor()
        assert torch.equal(output, dense(x))
        for model, result in ((adapted, output), (dense, dense(x))):
            model.zero_grad()
            result.square().sum().backward()
        torch.testing.assert_close(
            layer.lora_A["second"].weight.grad, dense.base_model.model[2].lora_A["second"].weight.grad
        )
        adapted.train()
    assert isinstance(layer.lora_A["second"], RazorModule)


# Adapters of parameters, which are there while the layer runs


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_up_proj", "down_proj"]], ids=["one", "both"])
def test_adapters_of_experts(targets: list[str]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GptOssConfig(**sizes, head_dim=8, vocab_size=64, num_hidden_layers=2, num_local_experts=4)
    model, ids = GptOssForCausalLM(config), torch.randint(64, (2, 24))
    batch = {"input_ids": ids, "labels": ids}
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=[f"mlp.experts.{each}" for each in targets], init_lora_weights=False
    )
    plain = peft.get_peft_model(model, config)
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    for _ in range(2):
        assert_same_step(razor, plain, batch)
    again = [key for key, m in razor.named_modules() if isinstance(m, RazorRecomputed) and m.razor_decision.again]
    assert [key for key in again if key.endswith("mlp.experts")]  # what holds the adapters
    assert not [key for key in again if key.endswith("base_layer")]


# Methods whose layers compute with sparse tensors, or remember their first forward


def _velora() -> peft.PeftConfig:
    velora = peft.VeloraConfig(init_type="batch_average_once", num_groups=8)
    return peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, velora_config=velora)


def _in_newer_peft(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not hasattr(peft, name), reason=f"this PEFT has no {name}")


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
@pytest.mark.parametrize(
    "make_config",
    [
        pytest.param(lambda: peft.ShiraConfig(r=2, target_modules=["layer"], init_weights=False), id="shira"),
        pytest.param(lambda: peft.FrodConfig(target_modules=["layer"]), id="frod", marks=_in_newer_peft("FrodConfig")),
        pytest.param(_velora, id="velora", marks=_in_newer_peft("VeloraConfig")),
    ],
)
def test_layers_with_sparse_weights_or_a_memory(make_config: Callable[[], peft.PeftConfig], preset: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.first(x).relu()).tanh())

    plain = peft.get_peft_model(Model(), make_config()).train()
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset(preset))
    for _ in range(2):
        x = torch.randn(6, 32)
        outputs = [model(x) for model in (plain, razor)]
        assert torch.equal(*outputs)
        found = []
        for model, output in zip((plain, razor), outputs, strict=True):
            model.zero_grad()
            output.square().sum().backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys() != set()
        assert cosine(found[1], found[0]) > (0.99999 if preset == "lossless" else 0.95)
        assert all(torch.equal(*buffers) for buffers in zip(plain.buffers(), razor.buffers(), strict=True))


# Trainer


@pytest.mark.parametrize("method", METHODS)
def test_trainer_saves_and_resumes_adapters(method: str, tmp_path: Path) -> None:
    def trained(folder: Path, resume: str | None = None) -> tuple[peft.PeftModel, Trainer]:
        torch.manual_seed(0)
        model, batch = make("gpt2")
        model.config.use_cache = False
        razor = get_razor_model(with_adapter(model, "gpt2", method))
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
    weights = "adapter_model.safetensors"
    assert (checkpoint / weights).read_bytes() != (tmp_path / "whole" / "checkpoint-4" / weights).read_bytes()
    assert not (checkpoint / "model.safetensors").exists()
    assert RazorConfig.from_pretrained(checkpoint) == whole.razor_config
    resumed, trainer = trained(tmp_path / "resumed", str(checkpoint))
    assert trainer.state.global_step == 4
    assert isinstance(resumed, RazorModel)
    assert_same_weights(resumed, whole)


# What DoRA, IA3 and layer scale multiply with


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5)])
def test_gradients_of_a_product_with_a_vector(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(scaling(x, vector, PackSpec()), x * vector)
    assert torch.autograd.gradcheck(lambda x, vector: scaling(x, vector, PackSpec()), (x, vector))

    # Coarsely packed, the input's gradient stays exact.
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    packed = torch.autograd.grad(scaling(x, vector, PackSpec(0.9, bits=2)), (x, vector), upstream)
    exact = torch.autograd.grad(x * vector, (x, vector), upstream)
    assert torch.equal(packed[0], exact[0])
    assert not torch.equal(packed[1], exact[1])
    assert packed[1].shape == vector.shape


def test_a_product_in_two_dtypes_has_the_gradients_of_autograd() -> None:
    x = torch.randn(4, 6, 8).bfloat16().requires_grad_()
    vector = torch.randn(8, requires_grad=True)
    found, expected = scaling(x, vector, PackSpec()), x * vector
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, vector), upstream) for y in (found, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_products_with_a_trained_vector_are_seen_when_they_run() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    class Fixed(Scaled):
        """What is multiplied by is no vector that is trained."""

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale.detach() * 2

    model = get_razor_model(nn.Sequential(Scaled(), Fixed()))
    assert "scaled tensor" not in repr(model)
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
    assert model[0].kind == "inline"
    assert model[1].kind == "other"
    assert [name for name, _ in model.razor_modules()] == ["0", "0.linear", "1.linear"]
    assert "scaled tensor, 1% of each row exact + 3 bits" in repr(model[0])
    assert "scaled tensor" not in repr(model[1])
