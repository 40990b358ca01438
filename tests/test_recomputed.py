"""Modules that save much for which razor has no operator, and are computed again (`modules/recomputed.py`)."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, RECOMPUTED, Batch, make
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.estimate import estimate_saved_bytes
from hf_backrazor.modules import RazorAttention, RazorModule, RazorRecomputed
from hf_backrazor.report import measure_saved_bytes

LOSSLESS = RazorConfig.preset("lossless")


class WrittenOut(nn.Module):
    """Attention in operators of torch."""

    def __init__(self, dim: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(hidden).chunk(3, -1)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores + mask
        return self.out(self.dropout(scores.softmax(-1)) @ v)


class Wrapped(nn.Module):
    """A model around a module: `before` and `after` are layers that razor has operators for."""

    def __init__(self, inner: nn.Module, dim: int = 32) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(dim, dim), inner, nn.Linear(dim, dim)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return self.after(self.inner(self.before(x), *others))


def gradients(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(*args).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def again(model: nn.Module) -> list[str]:
    """Names of the modules that are computed again."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, RazorRecomputed))
    return [name for name, module in found if module.razor_decision.again]


def test_attention_that_is_written_out_is_computed_again() -> None:
    model, x = Wrapped(WrittenOut()).train(), torch.randn(2, 64, 32)
    dense = measure_saved_bytes(model, x=x).total
    expected = gradients(model, x)
    torch.manual_seed(9)
    output = model(x)
    razor = get_razor_model(copy.deepcopy(model), LOSSLESS)
    torch.manual_seed(9)
    assert torch.equal(razor(x), output)
    assert again(razor) == ["inner"]
    assert_close(gradients(razor, x), expected)
    razor = get_razor_model(copy.deepcopy(model))
    assert measure_saved_bytes(razor, x=x).total < dense / 15
    found = gradients(razor, x)
    assert cosine(found, expected) > 0.99


def test_one_look_serves_all_modules_inside_of_each_other() -> None:
    runs: list[Any] = []

    class Counting(WrittenOut):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            runs.append(None)
            return super().forward(hidden, mask)

    inner: nn.Module = Counting()
    for _ in range(8):
        inner = Wrapped(inner)
    model = get_razor_model(nn.Sequential(inner)).train()
    output = model(torch.randn(2, 64, 32))
    assert len(runs) == 2  # to be looked at, and for what it returns
    assert again(model) == ["0" + 8 * ".inner"]
    output.sum().backward()
    assert len(runs) == 3


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_others_than_torch_are_drawn_once(draw: Callable[[], float]) -> None:
    class Drawing(WrittenOut):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(hidden, mask) * draw()

    model, x = Wrapped(Drawing()).train(), torch.randn(2, 64, 32)

    def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], float]:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        return model(x), gradients(model, x), draw()

    output, expected, following = run(copy.deepcopy(model))
    razor = get_razor_model(model, LOSSLESS)
    found_output, found, found_following = run(razor)
    assert again(razor) == ["inner"]
    assert torch.equal(found_output, output)
    assert_close(found, expected)
    assert found_following == following


class Modulated(nn.Module):
    """A block of a diffusion transformer: what it multiplies by is computed from its second input."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.net = nn.ModuleList([WrittenOut(dim, 0.0), nn.Linear(dim, dim)])
        self.time = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.time(time)[:, None].chunk(3, -1)
        hidden = self.norm(x) * (1 + scale) + shift
        for layer in self.net:
            hidden = layer(hidden) * gate
        return x + hidden


def test_layers_with_adapters_are_no_stack_of_layers() -> None:
    model = nn.Sequential(Wrapped(Modulated()))
    x, time = torch.randn(4, 64, 32), torch.randn(4, 32)
    for adapters in (False, True):
        subject = copy.deepcopy(model)[0]
        if adapters:
            subject = get_peft_model(subject, LoraConfig(r=4, target_modules=["qkv", "net.1", "time", "before"]))
            for name, parameter in subject.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        expected = gradients(subject, x, time)
        razor = get_razor_model(copy.deepcopy(subject))
        assert cosine(gradients(razor, x, time), expected) > 0.99
        assert again(razor)[0].endswith("inner")


class OfTorch(nn.Module):
    """Layers of torch that compute more than one thing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layers = {"attention": lambda: nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)}
        layers |= {"lstm": lambda: nn.LSTM(32, 32, num_layers=2, dropout=0.1, batch_first=True)}
        layers |= {"gru": lambda: nn.GRU(32, 32, batch_first=True)}
        self.before, self.layer, self.after = nn.Linear(32, 32), layers[kind](), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        return self.after(self.layer(*[hidden] * (3 if isinstance(self.layer, nn.MultiheadAttention) else 1))[0])


@pytest.mark.parametrize("kind", ["attention", "lstm", "gru"])
def test_layers_of_torch_without_an_operator(kind: str) -> None:
    model, x = OfTorch(kind).train(), torch.randn(2, 64, 32)
    dense = measure_saved_bytes(model, x=x).total
    expected = gradients(model, x)
    razor = get_razor_model(copy.deepcopy(model), LOSSLESS)
    assert_close(gradients(razor, x), expected)
    assert again(razor) == ["layer"]
    razor = get_razor_model(copy.deepcopy(model))
    assert measure_saved_bytes(razor, x=x).total < dense / 4
    assert cosine(gradients(razor, x), expected) > 0.99


def test_arguments_that_are_one_tensor_are_one_again() -> None:
    """Multi-head attention projects otherwise if query, key and value are one; hooks that copy give three."""
    model, x = OfTorch("attention").train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    with saved_tensors_hooks(torch.clone, lambda kept: kept):
        found = gradients(model, x)
    assert_close(found, expected)
    assert again(model) == ["layer"]


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected))
    return F.cosine_similarity(a, b, dim=0).item()


def test_masks_are_packed_and_kept_as_they_were() -> None:
    model, x = Wrapped(WrittenOut(dropout=0.0)).train(), torch.randn(2, 64, 32)
    mask = torch.full((1, 64, 64), torch.finfo(torch.float32).min).triu(1)
    expected = gradients(model, x, mask)
    get_razor_model(model, LOSSLESS)
    assert_close(gradients(model, x, mask), expected)
    loss = model(x, mask).square().sum()
    mask.zero_()  # the packed one is another tensor
    model.zero_grad()
    loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5", "resnet"])
def test_nothing_runs_twice_where_operators_take_all(name: str) -> None:
    model, batch = make(name)
    if name == "t5" and not any(map(RazorAttention.handles, model.modules())):
        pytest.skip("T5's attention is written out in this Transformers")
    get_razor_model(model).train()
    model(**batch)
    assert again(model) == []


def test_what_modules_hold_is_as_after_one_forward() -> None:
    """The forward that is looked at first leaves nothing behind, nor does the one in backward."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(32, 32), nn.BatchNorm1d(64)
            self.last: Tensor | None = None
            self.calls = 0
            self.seen: dict[str, list[int]] = {"rows": []}
            self.kinds: set[torch.dtype] = set()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen["rows"].append(len(x))
            if x.dtype not in self.kinds:
                self.kinds.add(x.dtype)
                x = 2 * x
            y = self.norm(self.linear(x))
            y = y if self.last is None else y + self.last
            self.last = y.detach().mean()
            for _ in range(8):
                y = (y.sin() * y.cos()).exp()
            return y

    dense = Wrapped(Stateful()).train()
    razor = get_razor_model(copy.deepcopy(dense), LOSSLESS)
    for _ in range(3):
        x = torch.randn(2, 64, 32)
        assert_close(gradients(razor, x), gradients(dense, x))
        assert torch.equal(razor.inner.norm.running_var, dense.inner.norm.running_var)
        assert torch.equal(razor.inner.last, dense.inner.last)
        assert razor.inner.calls == dense.inner.calls
        assert razor.inner.seen == dense.inner.seen
        assert razor.inner.kinds == dense.inner.kinds == {torch.float32}
    assert again(razor) == ["inner"]


def test_backward_reads_the_parameters_of_the_forward() -> None:
    model, x = Wrapped(WrittenOut(dropout=0.0)).train(), torch.randn(2, 64, 32)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(functional_call(model, others, x).square().sum(), [*others.values()])
    get_razor_model(model, LOSSLESS)
    for _ in range(2):
        found = torch.autograd.grad(functional_call(model, others, x).square().sum(), [*others.values()])
        assert_close(dict(enumerate(found)), dict(enumerate(expected)))
    assert again(model) == ["inner"]


def test_a_module_that_is_parametrized_from_outside_runs_once() -> None:
    """In backward it would be without; what does so is computed again instead, as it is a module, too."""

    class Scale(nn.Module):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.scale = [scale]

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.scale[0]

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.written_out, self.scale = WrittenOut(dropout=0.0), nn.Parameter(torch.full((96, 1), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            parametrize.register_parametrization(self.written_out.qkv, "weight", Scale(self.scale))
            try:
                return self.written_out(x)
            finally:
                parametrize.remove_parametrizations(self.written_out.qkv, "weight", leave_parametrized=False)

    model, x = Wrapped(Outside()).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    for _ in range(2):
        assert_close(gradients(model, x), expected)
    assert again(model) == ["inner"]


def test_a_module_whose_parametrizations_are_kept_runs_once() -> None:
    model, x = Wrapped(WrittenOut(dropout=0.0)).train(), torch.randn(2, 64, 32)
    parametrizations.weight_norm(model.inner.qkv)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    assert_close(gradients(model, x), expected)
    assert again(model) == ["inner"]
    with parametrize.cached():
        assert_close(gradients(model, x), expected)


def test_random_numbers_go_on_as_without() -> None:
    dense, x = Wrapped(WrittenOut(dropout=0.5)).train(), torch.randn(2, 64, 32)
    razor = get_razor_model(copy.deepcopy(dense))
    after = []
    for model in (dense, razor):
        torch.manual_seed(1)
        model(x).sum().backward()
        after.append(torch.rand(3))
    assert torch.equal(*after)


class Routed(nn.Module):
    """A mixture of experts; the router is inside, or its choice is an argument."""

    def __init__(self, routes: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 64) / 6), nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.router = nn.Parameter(torch.randn(32, 4)) if routes else None

    def forward(self, x: Tensor, expert: Tensor | None = None) -> Tensor:
        if self.router is not None:
            expert = (x.detach() @ self.router).argmax(-1)
        result = torch.zeros_like(x)
        for each in range(4):
            (places,) = torch.where(expert == each)
            result[places] = (x[places] @ self.up[each]).tanh().sin().exp() @ self.down[each]
        return result


def test_inputs_are_exact_where_values_decide_what_a_module_does() -> None:
    """Otherwise a token might go to another expert in backward, and the shapes would not fit."""
    model, x = Wrapped(Routed(routes=True)).train(), torch.randn(64, 32)
    expected = gradients(model, x)
    get_razor_model(model)
    gradients(model, x)
    assert again(model) == ["inner"]
    assert model.inner.razor_decision.exact
    torch.testing.assert_close(gradients(model, x)["inner.up"], expected["inner.up"], rtol=1e-4, atol=1e-4)


def test_inputs_are_packed_where_indices_are_arguments() -> None:
    model, x = Wrapped(Routed(routes=False)).train(), torch.randn(64, 32)
    expert = torch.randint(4, (64,))
    expected = gradients(model, x, expert)
    get_razor_model(model)
    assert cosine(gradients(model, x, expert), expected) > 0.99
    assert again(model) == ["inner"]
    assert not model.inner.razor_decision.exact


def test_users_hooks_inside_run_once() -> None:
    """Such as those that collect features for a loss."""
    model, x = Wrapped(WrittenOut()).train(), torch.randn(2, 64, 32)
    collected: list[Tensor] = []
    model.inner.qkv.register_forward_hook(lambda module, args, output: collected.append(output))
    get_razor_model(model)
    model(x)
    assert len(collected) == 1
    assert again(model) == []


def test_leaving_training_before_backward_does_not_change_the_gradient() -> None:
    model, x = Wrapped(WrittenOut(dropout=0.5)).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(x).square().sum()
    model.eval()
    loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    assert not any(module.training for module in model.modules())


def test_backward_uses_the_weights_that_the_forward_was_called_with() -> None:
    model, x = Wrapped(WrittenOut(dropout=0.0)).train(), torch.randn(2, 64, 32)
    others = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(torch.func.functional_call(model, others, (x,)).square().sum(), others.values())
    get_razor_model(model, LOSSLESS)
    model(x)
    assert again(model) == ["inner"]
    loss = torch.func.functional_call(model, others, (x,)).square().sum()
    for found, grad in zip(torch.autograd.grad(loss, others.values()), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-3)
    assert not any(p is other for p, other in zip(model.parameters(), others.values(), strict=True))


def test_no_warning_for_tied_embeddings_of_their_own_kind() -> None:
    settings = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma2Config(vocab_size=64, num_hidden_layers=1, **settings)
    model = get_razor_model(Gemma2ForCausalLM(config).train())
    ids = torch.randint(64, (2, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids, use_cache=False)


def test_a_module_may_change_its_input_in_place() -> None:
    class InPlace(WrittenOut):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            hidden.add_(0.1)
            return super().forward(hidden, mask)

    model, x = Wrapped(InPlace(dropout=0.0)).train(), torch.randn(2, 64, 32)
    output, expected = model(x), gradients(model, x)
    get_razor_model(model, LOSSLESS)
    assert torch.equal(model(x), output)
    assert_close(gradients(model, x), expected)
    assert again(model) == []


def test_the_output_may_be_changed_in_place() -> None:
    class Changes(Wrapped):
        def forward(self, x: Tensor, *others: Any) -> Tensor:
            hidden = self.before(x)
            return self.after(self.inner(hidden).add_(hidden).relu_())

    model, x = Changes(WrittenOut()).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    assert_close(gradients(model, x), expected)
    assert again(model) == ["inner"]


def test_a_module_that_checkpoints_parts_of_itself_runs_as_it_is() -> None:
    class Checkpoints(WrittenOut):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            return checkpoint(self.out, super().forward(hidden, mask).sin().exp(), use_reentrant=False)

    model, x = Wrapped(Checkpoints(dropout=0.0)).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    assert_close(gradients(model, x), expected)
    assert again(model) == []


def test_inside_of_activation_checkpointing_it_runs_as_it_is() -> None:
    runs: list[None] = []

    class Counting(WrittenOut):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            runs.append(None)
            return super().forward(hidden, mask)

    class Checkpointed(Wrapped):
        def forward(self, x: Tensor, *others: Any) -> Tensor:
            return self.after(checkpoint(self.inner, self.before(x), use_reentrant=False))

    model, x = Checkpointed(Counting()).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    get_razor_model(model, LOSSLESS)
    for looks in (1, 0):
        runs.clear()
        assert_close(gradients(model, x), expected)
        assert len(runs) == looks + 2


def test_without_gradients_nothing_is_looked_at() -> None:
    model, x = get_razor_model(Wrapped(WrittenOut())).eval(), torch.randn(2, 64, 32)
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert model.inner.razor_decision.again is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = get_razor_model(Wrapped(WrittenOut()), LOSSLESS).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    other = copied(model)
    assert again(other) == ["inner"]
    assert_close(gradients(other, x), expected)


def test_the_plain_classes_come_back() -> None:
    model, batch = make("llama")
    classes = [type(module) for module in model.modules()]
    get_razor_model(model).train()
    model(**batch)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, RazorRecomputed)
    assert attention.kind == "attention"
    model.remove_razor()
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("razor_") for module in model.modules() for name in vars(module))


def test_disabled_razor_runs_nothing_twice() -> None:
    model, x = get_razor_model(Wrapped(WrittenOut())).train(), torch.randn(2, 64, 32)
    model(x)
    runs: list[int] = []
    model.inner.qkv.register_forward_hook(lambda *_: runs.append(1))
    with model.disable_razor():
        model(x).sum().backward()
    assert len(runs) == 1
    model(x).sum().backward()
    assert len(runs) == 3


def test_compiled_models_compute_the_same_modules_again() -> None:
    model, x = get_razor_model(Wrapped(WrittenOut(dropout=0.0)), LOSSLESS).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, x)
    assert_close({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, expected)


def test_a_model_that_is_compiled_from_the_start() -> None:
    model, x = Wrapped(WrittenOut(dropout=0.0)).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(get_razor_model(model, LOSSLESS), backend="aot_eager")
    for _ in range(2):
        found = gradients(compiled, x)
        assert_close({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, expected)
    assert again(model) == ["inner"]


@pytest.mark.filterwarnings("ignore:saved dense")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECOMPUTED)
def test_language_models(name: str, dtype: torch.dtype) -> None:
    model, batch = make(name)
    model.to(dtype)
    dense = measure_saved_bytes(model, **batch).total
    expected, grads = step(copy.deepcopy(model), batch)
    razor = get_razor_model(copy.deepcopy(model), LOSSLESS)
    output, found = step(razor, batch)
    assert torch.equal(output, expected)
    assert cosine(found, grads) > 0.99999
    razor = get_razor_model(copy.deepcopy(model))
    output, found = step(razor, batch)
    assert torch.equal(output, expected)
    assert again(razor)
    assert cosine(found, grads) > 0.97
    assert measure_saved_bytes(razor, **batch).total < dense / (4 if dtype == torch.bfloat16 else 6)


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    output = model(**batch)
    output.loss.backward()
    logits = output.logits.detach().clone()
    return logits, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def falcon(**changes: Any) -> FalconForCausalLM:
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **changes)
    return FalconForCausalLM(config).train()


def test_an_estimate_is_what_is_measured() -> None:
    model = get_razor_model(falcon(use_cache=False))
    ids = torch.randint(64, (2, 48))
    estimated = estimate_saved_bytes(model, (2, 48)).total
    assert all(m.razor_decision.again is None for m in model.modules() if isinstance(m, RazorRecomputed))
    assert estimated == pytest.approx(measure_saved_bytes(model, input_ids=ids, labels=ids).total, rel=0.02)


def test_a_cache_is_not_filled_twice() -> None:
    config = XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4)
    dense = XLMWithLMHeadModel(config).train()
    razor = get_razor_model(copy.deepcopy(dense), LOSSLESS)
    ids = torch.randint(64, (2, 32))
    outputs = []
    for model in (dense, razor, razor):
        torch.manual_seed(0)
        outputs.append(model(ids, labels=ids, use_cache=True).loss)
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[1])


def test_modules_with_methods_of_any_name() -> None:
    class Names(WrittenOut):
        def _forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden)

        _decide = _spec = _pack = _forward

        def forward(self, hidden: Tensor) -> Tensor:
            return self._decide(self._spec(self._pack(self._forward(hidden))))

    model, x = Wrapped(Names(dropout=0.0)).train(), torch.randn(2, 64, 32)
    expected = gradients(model, x)
    assert_close(gradients(get_razor_model(model, LOSSLESS), x), expected)


def test_heads_and_stacks_stay_in_one_piece() -> None:
    """A head's logits are put off until somebody asks; a stack of layers would be whole in backward."""
    for name in ARCHITECTURES:
        model, _ = make(name)
        get_razor_model(model)
        for path, module in model.named_modules():
            if isinstance(module, RazorRecomputed):
                assert not any(type(inner).__name__.endswith("LMHead") for inner in module.modules()), path
                layers = [m for m in module.modules() if "GradientCheckpointingLayer" in map(_name, type(m).__mro__)]
                assert layers in ([], [module]), path


def _name(cls: type) -> str:
    return cls.__name__


def test_targets_hold_for_modules_that_are_computed_again() -> None:
    model, x = Wrapped(WrittenOut()).train(), torch.randn(2, 64, 32)
    get_razor_model(model, RazorConfig(exclude_modules=["inner"]))
    model(x)
    assert not isinstance(model.inner, RazorModule)
    assert "computed again" not in repr(model)
    model.remove_razor()
    get_razor_model(model, RazorConfig(target_modules=["inner"]))
    model(x)
    assert again(model) == ["inner"]
    assert "computed again from its inputs in 8 bits" in repr(model)
