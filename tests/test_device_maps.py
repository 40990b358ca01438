"""Models with Accelerate's hooks on their modules, as `device_map` and `dispatch_model` leave them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from hf_backrazor.modules import RazorModule

SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, use_cache=False))


def gpt2() -> PreTrainedModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, use_cache=False, **ends))


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=2))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().train()


def hooked(model: nn.Module) -> nn.Module:
    """With a hook on each module, as if it lay on several devices."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(100, (2, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    output = model(**batch())
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hooks_first(model: nn.Module, config: RazorConfig) -> nn.Module:
    return get_razor_model(hooked(model), config)


def razor_first(model: nn.Module, config: RazorConfig) -> nn.Module:
    return hooked(get_razor_model(model, config))


ORDERS = pytest.mark.parametrize("order", [hooks_first, razor_first])
Order = Callable[[nn.Module, RazorConfig], nn.Module]


@ORDERS
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config", [RazorConfig.preset("lossless"), RazorConfig.preset("lossless", recompute="blocks")], ids=["", "blocks"]
)
def test_gradients_are_those_of_the_hooked_model(config: RazorConfig, name: str, order: Order) -> None:
    logits, expected = step(hooked(make(name)))
    found_logits, found = step(order(make(name), config))
    assert torch.equal(found_logits, logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@ORDERS
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["balanced", "compact"])
def test_as_little_is_saved_as_without_hooks(preset: str, name: str, order: Order) -> None:
    config = RazorConfig.preset(preset)
    expected = measure_saved_bytes(get_razor_model(make(name), config), **batch()).total
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is left dense
        found = measure_saved_bytes(order(make(name), config), **batch()).total
    assert found == expected
    assert 6 * found < measure_saved_bytes(make(name), **batch()).total


@ORDERS
@pytest.mark.parametrize("preset", ["balanced", "compact"])
def test_what_was_there_before_is_left(preset: str, order: Order) -> None:
    model = order(make("llama"), RazorConfig.preset(preset))
    step(model)
    model.remove_razor()
    assert not any(isinstance(module, RazorModule) for module in model.modules())
    logits, expected = step(hooked(make("llama")))
    for _ in range(2):
        found_logits, found = step(model)
        assert torch.equal(found_logits, logits)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        for module in model.modules():
            forward = module.__dict__.get("_old_forward", module.forward)
            assert isinstance(forward, MethodType)
            assert forward.__func__ is type(module).forward
        remove_hook_from_submodules(model)


def test_hooks_may_go_while_the_razor_stays() -> None:
    config = RazorConfig.preset("lossless")
    expected = step(make("llama"))[1]
    model = get_razor_model(hooked(make("llama")), config)
    remove_hook_from_submodules(model)
    saved = measure_saved_bytes(model, **batch()).total
    assert saved == measure_saved_bytes(get_razor_model(make("llama"), config), **batch()).total
    torch.testing.assert_close(step(model)[1], expected, rtol=1e-4, atol=1e-6)


def test_hooks_see_the_inputs_of_razor_layers() -> None:
    # What a hook changes is what the layer computes with, in forward and in backward.
    model = get_razor_model(hooked(make("llama")), RazorConfig.preset("lossless"))
    plain = hooked(make("llama"))
    unchanged = step(plain)[0]
    for each in (model, plain):
        each.model.layers[0].mlp.down_proj._hf_hook.pre_forward = lambda module, x: ((2 * x,), {})
    (found_logits, found), (logits, expected) = step(model), step(plain)
    assert torch.equal(found_logits, logits)
    assert not torch.equal(logits, unchanged)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", ["balanced", "compact"])
def test_adapters_on_a_hooked_base(preset: str) -> None:
    def adapted(base: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.1)
        return get_peft_model(base, lora).train()

    config = RazorConfig.preset(preset)
    expected = step(get_razor_model(adapted(make("llama")), config))
    found = step(get_razor_model(adapted(hooked(make("llama"))), config))
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], value) for key, value in expected[1].items())


def test_a_model_that_resizes_its_logits() -> None:
    # Its own forward is one that razor extends.
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], hidden_sizes=[16], num_attention_heads=[1], strides=[4], patch_sizes=[7],
        sr_ratios=[1], mlp_ratios=[2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(config).train()
    images = {"pixel_values": torch.randn(1, 3, 64, 64), "labels": torch.randint(4, (1, 64, 64))}
    dense = measure_saved_bytes(model, **images).total
    razor = measure_saved_bytes(get_razor_model(hooked(model)), **images).total
    assert 5 * razor < dense


def test_a_forward_that_somebody_else_has_set_is_left_and_named() -> None:
    model = make("llama")
    down = model.model.layers[0].mlp.down_proj
    down.forward = lambda x: nn.functional.linear(x, down.weight) * 2
    expected = step(model)[1]
    with pytest.warns(UserWarning, match=r"forward was replaced on the instance: model\.layers\.0\.mlp\.down_proj$"):
        get_razor_model(model, RazorConfig.preset("lossless"))
    torch.testing.assert_close(step(model)[1], expected, rtol=1e-4, atol=1e-6)
