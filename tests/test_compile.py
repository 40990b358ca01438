"""`torch.compile`: one graph, the gradients of eager razor, and no more saved than there."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import Batch, make
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.modules.lm_head import LazyLogits
from hf_backrazor.packing import layout
from hf_backrazor.report import measure_saved_bytes

NAMES = ("bert", "vit", "gpt2", "llama")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def one_graph(model: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def prepared(name: str, lora: bool = False, dropout: float = 0.0) -> tuple[nn.Module, Batch]:
    model, batch = make(name)
    # Transformers' notice that it guesses the loss cannot be traced, with razor or without.
    model.loss_type = getattr(model, "loss_type", None) or "ForCausalLM"
    if lora:
        adapters = LoraConfig(target_modules="all-linear", r=4, lora_dropout=dropout, init_lora_weights=False)
        model = get_peft_model(model, adapters)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        for attribute in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, dropout)
    return model.train(), batch


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def compiled_gradients(compiled: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {key.removeprefix("_orig_mod."): grad for key, grad in gradients(compiled, batch).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, **tolerances)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_training_is_one_graph(name: str, lora: bool) -> None:
    """From the first step on, which eager razor looks at."""
    model, batch = prepared(name, lora)
    compiled = one_graph(get_razor_model(model, RazorConfig(min_numel=0)))
    found = compiled_gradients(compiled, batch)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same(found, gradients(model, batch))
    assert measure_saved_bytes(compiled, **batch).total <= 1.1 * measure_saved_bytes(model, **batch).total


@pytest.mark.slow
def test_a_step_that_calls_the_model_is_one_graph() -> None:
    """There the model is traced as part of something else, with no first forward to look at."""
    model, batch = prepared("llama", lora=True)
    get_razor_model(model, RazorConfig(min_numel=0))

    def loss_of(batch: Batch) -> Tensor:
        output = model(**batch)
        return output.loss + output.logits.square().mean()

    model.zero_grad()
    one_graph(loss_of)(batch).backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss_of(batch).backward()
    assert_same(found, {key: p.grad for key, p in model.named_parameters() if p.grad is not None})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_is_drawn_again_in_backward(backend: str) -> None:
    """Along a direction, the loss changes as the gradient says, if both are for the same random numbers."""
    model, batch = prepared("bert", dropout=0.3)
    compiled = one_graph(get_razor_model(model.double(), RazorConfig.preset("lossless")), backend)

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return compiled(**batch).loss

    assert loss(1) == loss(1) != loss(2)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss(3), parameters)
    directions = [torch.randn_like(p) * p.abs().mean() for p in parameters]
    step, values = 1e-5, []
    for by in (step, -2 * step):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=by)
        values.append(loss(3).item())
    expected = sum((grad * direction).sum().item() for grad, direction in zip(grads, directions, strict=True))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_each_layer_draws_other_numbers() -> None:
    """What is computed from the same tensor twice is computed once by the compiler; numbers are not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(64, 64), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.stack([self.dropout(y), self.dropout(y)])

    first, second = one_graph(get_razor_model(Twice().train()))(torch.randn(32, 64))
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.slow
def test_masks_with_holes() -> None:
    """Eager razor looks at a mask's values to store where each row's run of ones starts and ends; a graph cannot."""
    model, batch = prepared("bert")
    batch["attention_mask"] = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1]] * 3)
    plain = gradients(copy.deepcopy(model), batch)
    compiled = one_graph(get_razor_model(model, RazorConfig.preset("lossless")))
    assert_same(compiled_gradients(compiled, batch), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_changes_in_place_are_seen() -> None:
    """What is known of a tensor does not hold after it was written to, in a graph either."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            y += torch.sin(x)
            y.view(-1, 64)[::2].mul_(3)
            return self.second(F.relu(self.first(y), inplace=True))

    plain, x = InPlace().train(), torch.randn(4, 16, 64)
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    expected = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    found = torch.autograd.grad(one_graph(razor)(x).square().sum(), list(razor.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_autocast() -> None:
    model, batch = prepared("bert")
    compiled = one_graph(get_razor_model(model, RazorConfig(min_numel=0)))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled_gradients(compiled, batch), gradients(model, batch)
        saved, eager = (measure_saved_bytes(each, **batch).total for each in (compiled, model))
    assert_same(found, expected, rtol=0.02, atol=1e-3)
    assert saved <= 1.1 * eager


@pytest.mark.slow
def test_every_slice_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SLICE_NUMEL", {"cpu": 8 * 96})
    model, batch = prepared("llama")
    compiled = one_graph(get_razor_model(model, RazorConfig(min_numel=0)))
    assert_same(compiled_gradients(compiled, batch), gradients(model, batch))


@pytest.mark.slow
def test_other_shapes_get_a_graph_of_their_own() -> None:
    model, batch = prepared("gpt2")
    compiled = one_graph(get_razor_model(model, RazorConfig(min_numel=0)))
    for length in (12, 9, 5):
        part = {key: x[:, :length] for key, x in batch.items()}
        assert_same(compiled_gradients(compiled, part), gradients(model, part))


@pytest.mark.slow
def test_what_the_user_changes_later_is_seen() -> None:
    model, batch = prepared("bert", dropout=0.5)
    dense = copy.deepcopy(model)
    compiled = one_graph(get_razor_model(model))
    compiled(**batch).loss.backward()
    # Other rates of dropout, by attribute.
    for module in (*model.modules(), *dense.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    torch.testing.assert_close(compiled(**batch).loss, dense(**batch).loss)
    saved = measure_saved_bytes(compiled, **batch).total
    with model.disable_razor():
        assert_same(compiled_gradients(compiled, batch), gradients(dense, batch))
        assert measure_saved_bytes(compiled, **batch).total > 3 * saved
    torch.testing.assert_close(compiled.eval()(**batch).logits, dense.eval()(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_logits_of_a_compiled_model_are_lazy(in_place: bool) -> None:
    """The graph returns what they are computed from, and backward is given no gradient of their size."""
    model, batch = prepared("llama")
    labels = batch.pop("labels")
    expected = copy.deepcopy(model)
    F.cross_entropy(expected(**batch).logits.flatten(0, 1), labels.flatten()).backward()
    get_razor_model(model, RazorConfig.preset("lossless"))
    if in_place:
        model.compile(backend="aot_eager", fullgraph=True)
    logits = (model if in_place else one_graph(model))(**batch).logits
    assert isinstance(logits, LazyLogits)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for found, p in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_loss_is_never_whole() -> None:
    """With more classes than all else together."""
    model, batch = make("llama")
    model.resize_token_embeddings(20000)
    compiled = one_graph(get_razor_model(model.train()))
    saved = measure_saved_bytes(compiled, **batch).total
    assert saved < batch["input_ids"].numel() * 20000


@pytest.mark.slow
def test_adapters_of_another_dtype_share_copies() -> None:
    """What a 16-bit model casts for adapters in float32 is packed once, also where the compiler traces the casts."""
    model, batch = prepared("llama")
    adapters = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(model.bfloat16(), adapters)
    assert next(p for p in model.parameters() if p.requires_grad).dtype == torch.float32
    compiled = one_graph(get_razor_model(model.train(), RazorConfig(min_numel=0)))
    assert_same(compiled_gradients(compiled, batch), gradients(model, batch), rtol=0.02, atol=1e-3)
    assert measure_saved_bytes(compiled, **batch).total <= 1.1 * measure_saved_bytes(model, **batch).total


@pytest.mark.slow
def test_integers_are_not_rounded_by_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that is drawn while the compiler traces would be that of every step. So the codes are unpacked."""
    model, batch = prepared("bert")
    get_razor_model(model, RazorConfig(weight_gradient="int8", min_numel=0))
    found = compiled_gradients(one_graph(model), batch)
    monkeypatch.setattr(sys.modules["hf_backrazor.functional.linear"], "_grads_by_integers", lambda *args: (None, None))
    assert_same(found, gradients(model, batch))


@pytest.mark.slow
def test_blocks_are_computed_again_without_the_compiler() -> None:
    model, batch = prepared("llama")
    get_razor_model(model, RazorConfig.preset("compact"))
    expected = gradients(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert_same(compiled_gradients(compiled, batch), expected)
    assert measure_saved_bytes(compiled, **batch).total < 1.1 * measure_saved_bytes(model, **batch).total


@pytest.mark.slow
def test_overrides() -> None:
    plain = nn.Sequential(OrderedDict(up=nn.Linear(8, 16), act=nn.GELU(), down=nn.Linear(16, 8)))
    model = get_razor_model(plain, RazorConfig(overrides={"up": {"sparsity": 0.5}, "down": {"sparsity": 0.75}}))
    x = torch.randn(4, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    grads = torch.autograd.grad(one_graph(model)(x).square().sum(), list(model.parameters()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
