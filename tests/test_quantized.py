"""Frozen linear layers with quantised weights: nothing but these is kept for backward."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from hf_backrazor.functional.frozen_linear import frozen_linear
from hf_backrazor.live_memory import LiveMemory
from hf_backrazor.modules import RazorQuantizedLinear


def test_frozen_linear_saves_nothing_and_has_the_gradients_of_the_function() -> None:
    torch.manual_seed(0)
    weight, bias, x, grad = torch.randn(5, 8), torch.randn(5), torch.randn(2, 3, 8), torch.randn(2, 3, 5)
    x.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        y = frozen_linear(partial(F.linear, weight=weight * 1, bias=bias), x)
    assert saved == []
    assert torch.equal(y, F.linear(x, weight, bias))
    (found,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(found, torch.autograd.grad(F.linear(x, weight, bias), x, grad)[0])


def test_the_gradient_of_frozen_linear_can_be_differentiated() -> None:
    weight = torch.randn(5, 8, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    function = partial(frozen_linear, partial(F.linear, weight=weight))
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_frozen_linear_runs_again_in_the_autocast_of_its_forward() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 8), torch.randn(3, 8, requires_grad=True)

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    plain = partial(F.linear, weight=weight)
    assert torch.equal(gradient(partial(frozen_linear, plain)), gradient(plain))


class _KeepsInput(torch.autograd.Function):
    """As that of bitsandbytes: it keeps the input in an attribute."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.tensors = x, weight, scale
        return F.linear(x, weight * scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        _, weight, scale = ctx.tensors
        return grad @ (weight * scale), None, None


class Linear8bitLt(nn.Linear):
    """Stands for the layer of bitsandbytes of this name."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight = nn.Parameter((self.weight * 100).to(torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        y = _KeepsInput.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


Linear8bitLt.__module__ = "bitsandbytes.nn.modules"


def deep(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), *(Linear8bitLt(256, 256, bias) for _ in range(4)), nn.Linear(256, 4))


def live_after_forward(model: nn.Module, x: Tensor) -> int:
    gc.collect()
    with LiveMemory([*model.parameters(), *model.buffers(), x]) as memory:
        y = model(x)
        gc.collect()
        live = memory.live
    del y
    return live


def test_an_input_that_a_layer_in_8_bits_keeps_out_of_sight_is_not_kept() -> None:
    x = torch.randn(512, 16)
    model = deep()
    expected = {name: g.clone() for name, g in gradients(model, x).items()}
    dense = live_after_forward(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_razor_model(model, RazorConfig.preset("lossless"))
    assert sum(isinstance(module, RazorQuantizedLinear) for _, module in model.razor_modules()) == 4
    # Between the five layers dense training keeps five inputs.
    assert live_after_forward(model, x) < dense / 3
    found = gradients(model, x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_checkpoints_drop_what_a_layer_in_8_bits_keeps() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(*(Linear8bitLt(256, 256, bias=False) for _ in range(6)))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.randn(512, 16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), Block(), nn.Linear(256, 4))
    expected = {name: g.clone() for name, g in gradients(model, x).items()}
    get_razor_model(model, RazorConfig.preset("lossless", recompute="blocks", recompute_modules=["Block"]))
    # The block's input, and that of the last layer.
    assert live_after_forward(model, x) < 3 * 512 * 256 * 4
    for name, grad in gradients(model, x).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-3)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_trained_bias_gets_its_gradient() -> None:
    x = torch.randn(32, 16)
    expected = gradients(deep(bias=True), x)
    assert "1.bias" in expected
    found = gradients(get_razor_model(deep(bias=True), RazorConfig.preset("lossless")), x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_the_weight_of_the_forward_is_the_one_of_backward() -> None:
    x = torch.randn(32, 16)
    expected = gradients(deep(), x)
    model = get_razor_model(deep(), RazorConfig.preset("lossless"))
    y = model(x).square().sum()
    for layer in model[1:5]:
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    y.backward()
    torch.testing.assert_close(model[0].weight.grad, expected["0.weight"])


def test_a_frozen_layer_with_a_forward_of_its_own_gets_no_warning() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.t())

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4).requires_grad_(False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_razor_model(model, RazorConfig.preset("paper"))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256, use_cache=False)).bfloat16()


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, make(layer))


def bitsandbytes_4(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return new.to("cpu")

    replace_linears(model, make)


def bitsandbytes_8(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    replace_linears(model, make)


def torchao_8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    linears = {layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda layer, _: layer in linears)


def quanto_8(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)


def adapted(quantise: Callable[[nn.Module], None] | None, in_float32: bool, dropout: float) -> nn.Module:
    model = llama()
    if quantise is not None:
        quantise(model)
    model.enable_input_require_grads()
    config = LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(model, config, autocast_adapter_dtype=in_float32).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


BATCH = {"input_ids": torch.arange(256).view(2, 128), "labels": torch.arange(256).view(2, 128)}


def lora_gradient(model: nn.Module) -> Tensor:
    model.zero_grad()
    torch.manual_seed(2)
    model(**BATCH).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:MatMul8bitLt|.*was instantiated without|.*is deprecated")
@pytest.mark.parametrize("in_float32", [False, True], ids=["bfloat16 adapters", "float32 adapters"])
@pytest.mark.parametrize("quantise", [bitsandbytes_4, bitsandbytes_8, torchao_8, quanto_8])
def test_lora_on_quantised_layers(quantise: Callable[[nn.Module], None], in_float32: bool) -> None:
    model = adapted(quantise, in_float32, dropout=0.05)
    expected, dense = lora_gradient(model), measure_saved_bytes(model, **BATCH).total
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_razor_model(model, RazorConfig.preset("lossless"))
    assert not [each for each in caught if "saved dense" in str(each.message)]
    found = lora_gradient(model)
    assert F.cosine_similarity(found, expected, dim=0) > 0.9999
    assert torch.linalg.vector_norm(found - expected) < 0.01 * torch.linalg.vector_norm(expected)
    get_razor_model(model.remove_razor())
    unquantised = get_razor_model(adapted(None, in_float32, dropout=0.05))
    lora_gradient(model)
    lora_gradient(unquantised)
    saved = measure_saved_bytes(model, **BATCH).total
    assert saved * 5 < dense
    assert saved <= measure_saved_bytes(unquantised, **BATCH).total


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("in_float32", [False, True], ids=["bfloat16 adapters", "float32 adapters"])
def test_adapters_of_q_k_and_v_share_what_is_kept_of_their_input(in_float32: bool, dropout: float) -> None:
    model = get_razor_model(adapted(None, in_float32, dropout))
    saved = measure_saved_bytes(model, **BATCH).by_module
    of_a = {
        name.split(".")[-3]: size
        for name, size in saved.items()
        if "layers.1.self_attn" in name and name.endswith("lora_A.default")
    }
    # What the norm keeps serves all three; the first of them adds the norm's weight.
    assert of_a.get("k_proj", 0) == of_a.get("v_proj", 0) == 0
    assert of_a["q_proj"] <= 4 * 128
    bits = 2 * 128 * 128 // 8 if dropout else 0
    assert saved.get("base_model.model.model.layers.1.self_attn.k_proj.lora_dropout.default", 0) == bits
