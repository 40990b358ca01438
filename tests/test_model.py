"""`get_razor_model` and `RazorModel`: what they promise, and what they refuse."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from architectures import checkpoint_activations, make
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForSequenceClassification,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

from hf_backrazor import MemoryReport, RazorConfig, RazorModel, get_razor_model, measure_saved_bytes
from hf_backrazor.modules import RazorActivation, RazorAttention, RazorLinear, RazorModule


def gradients(model: nn.Module, batch: dict, seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def replaced(model: PreTrainedModel, kind: str | None = None) -> set[str]:
    return {name for name, module in model.razor_modules() if kind in (None, module.kind)}


class Block(nn.Module):
    """A model outside of Transformers, made of the same parts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def test_the_same_object_comes_back_with_its_type_extended() -> None:
    model, _ = make("bert")
    other, _ = make("bert")
    plain_type, parameters = type(model), list(model.parameters())
    razor = get_razor_model(model, RazorConfig(sparsity=0.9))
    assert razor is model
    assert isinstance(razor, plain_type)
    assert isinstance(razor, RazorModel)
    assert type(razor).__name__ == plain_type.__name__
    assert razor.razor_config.sparsity == 0.9
    assert all(a is b for a, b in zip(razor.parameters(), parameters, strict=True))
    # Neither the library's classes nor other models change.
    assert type(other) is plain_type
    assert nn.Linear(2, 2).forward.__func__ is nn.Linear.forward
    assert not any(isinstance(module, RazorModule) for module in other.modules())


def test_one_more_of_a_layers_class_is_a_plain_one() -> None:
    model, _ = make("bert")
    get_razor_model(model)
    layer = model.bert.encoder.layer[0].output.dense
    assert isinstance(layer, RazorLinear)
    other = type(layer)(4, out_features=3)
    assert type(other) is nn.Linear
    assert other.weight.shape == (3, 4)
    assert inspect.signature(type(layer)) == inspect.signature(nn.Linear)
    whole = type(model)(model.config)
    assert type(whole) is BertForSequenceClassification
    assert not any(isinstance(module, RazorModule) for module in whole.modules())


def test_models_that_share_a_config_object_are_not_affected() -> None:
    config = BertConfig(vocab_size=64, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96)
    razor, other = BertForSequenceClassification(config), BertForSequenceClassification(config)
    before = config.to_dict()
    get_razor_model(razor)
    assert config.to_dict() == before
    assert razor.config is other.config
    assert other.config._attn_implementation == "sdpa"
    assert razor.bert.encoder.layer[0].attention.self.config._attn_implementation == "razor"
    assert razor.bert.encoder.layer[0].attention.self.config.hidden_size == 48


def test_set_attn_implementation_goes_on_working() -> None:
    model, batch = make("bert", "sdpa")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    get_razor_model(model, RazorConfig.preset("lossless"))
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    expected = eager(**batch).logits
    torch.manual_seed(0)
    assert torch.equal(model(**batch).logits, expected)
    model.eval()
    assert model(**batch, output_attentions=True).attentions[0] is not None


def test_printing_shows_what_was_replaced_and_how() -> None:
    for name, shown in (("bert", "RazorBertSelfAttention"), ("gpt2", "RazorConv1D"), ("llama", "RazorLlamaRMSNorm")):
        model, _ = make(name)
        text = repr(get_razor_model(model, RazorConfig(sparsity=0.97, residual_bits=3)))
        assert shown in text
        assert "razor=3% of each row exact + 3 bits" in text


def test_a_second_call_is_refused() -> None:
    model, _ = make("vit")
    get_razor_model(model)
    with pytest.raises(
        ValueError, match=r"this \(ViTForImageClassification\) was prepared by .* already; call `remove_razor\(\)`"
    ):
        get_razor_model(model)


class OutOfOrder(abc.ABC):  # noqa: B024
    """A base with slots of its own below it, so that Python does not let its objects change their class."""


class AbstractLinear(OutOfOrder, nn.Linear):
    pass


class AbstractModel(OutOfOrder, nn.Sequential):
    pass


def test_a_layer_whose_class_cannot_be_extended_is_left_and_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), AbstractLinear(8, 8)).train()
    expected = gradients_of(model, torch.ones(3, 4, 8))
    with pytest.warns(UserWarning, match="a class such as ABC or Generic comes first among the bases of its class: 1$"):
        get_razor_model(model, RazorConfig.preset("lossless"))
    assert [name for name, _ in model.razor_modules()] == ["0"]
    torch.testing.assert_close(gradients_of(model, torch.ones(3, 4, 8)), expected)


def test_a_model_whose_class_cannot_be_extended_is_refused() -> None:
    model = AbstractModel(nn.Linear(8, 8))
    with pytest.raises(
        TypeError, match=r"AbstractModel cannot be extended: expected nn\.Module before classes such as"
    ):
        get_razor_model(model)
    assert type(model[0]) is nn.Linear


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_all_is_prepared_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make("llama")
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    installed = []

    def fail_at_the_third(cls: type[RazorLinear], module: nn.Module, config: RazorConfig) -> None:
        installed.append(module)
        super(RazorLinear, cls).install(module, config)
        if len(installed) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RazorLinear, "install", classmethod(fail_at_the_third))
        with pytest.raises(KeyboardInterrupt):
            get_razor_model(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert isinstance(get_razor_model(model), RazorModel)


def test_what_is_added_takes_no_name_that_a_plain_module_would_be_asked_for() -> None:
    model = get_razor_model(nn.Sequential(nn.Linear(8, 8)))
    for name in ("save_pretrained", "push_to_hub", "create_or_update_model_card", "unload"):
        assert not hasattr(model, name)


def test_a_layer_that_is_replaced_later_is_prepared_by_train() -> None:
    model, batch = make("bert")
    model = get_razor_model(model)
    model.classifier = nn.Linear(model.classifier.in_features, model.classifier.out_features)
    assert not isinstance(model.classifier, RazorLinear)
    model.eval()
    assert not isinstance(model.classifier, RazorLinear)
    for trained in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert isinstance(trained.train().classifier, RazorLinear)
        assert trained.classifier.razor_config == model.razor_config
        trained(**batch).loss.backward()
    assert not isinstance(model.remove_razor().train().classifier, RazorLinear)


def test_a_forward_that_somebody_sets_later_is_named_by_train() -> None:
    # As kernels do that are patched into a model, such as Liger's.
    model, _ = make("llama")
    model = get_razor_model(model)
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: x
    with pytest.warns(UserWarning, match=r"replaced on the instance: model\.layers\.0\.input_layernorm$"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()  # said once


@pytest.mark.parametrize("attribute", ["model", "reward_model"])
def test_a_language_model_inside_of_a_module_saves_what_it_saves_by_itself(attribute: str) -> None:
    class Holder(nn.Module):
        def __init__(self, held: nn.Module) -> None:
            super().__init__()
            setattr(self, attribute, held)

        def forward(self, **batch: Tensor) -> Tensor:
            return getattr(self, attribute)(**batch).loss

    model, batch = make("llama")
    alone = measure_saved_bytes(get_razor_model(copy.deepcopy(model)), **batch).total
    held = get_razor_model(Holder(model))
    assert measure_saved_bytes(held, **batch).total == alone
    assert held.get_submodule(attribute).get_output_embeddings().kind == "head"


def test_a_model_with_nothing_to_replace_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Flatten())
    with pytest.raises(ValueError, match="nothing to replace in this Sequential"):
        get_razor_model(model)
    assert type(model) is nn.Sequential


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["query", "querry"]}, "querry"),
        ({"target_modules": r".*\.quary"}, "quary"),
        ({"layers_to_transform": [0, 7]}, "7"),
        ({"overrides": {"kee": {"sparsity": 0.5}}}, "kee"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_by_name(settings: dict, named: str) -> None:
    model, _ = make("bert")
    with pytest.raises(ValueError, match=named):
        get_razor_model(model, RazorConfig(**settings))
    assert not isinstance(model, RazorModel)
    assert not any(isinstance(module, RazorModule) for module in model.modules())


def test_targets_exclusions_layers_and_overrides() -> None:
    model, _ = make("bert")
    get_razor_model(
        model,
        RazorConfig(
            target_modules=["query", "key", "value", "output.dense"],
            exclude_modules=["value"],
            layers_to_transform=1,
            overrides={r"attention\.output\.dense": {"sparsity": 0.5, "residual_bits": 0}},
        ),
    )
    layer = "bert.encoder.layer.1"
    expected = {f"{layer}.attention.self.query", f"{layer}.attention.self.key"}
    expected |= {f"{layer}.attention.output.dense", f"{layer}.output.dense"}
    assert replaced(model) == expected
    settings = dict(model.razor_modules())
    assert settings[f"{layer}.attention.output.dense"].razor_config.sparsity == 0.5
    assert settings[f"{layer}.output.dense"].razor_config.sparsity == 0.99


class TiedByHand(Block):
    """Computes with a layer's weight without calling the layer; and asks for its dtype, as T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(self.norm(x))).to(self.up.weight.dtype)
        return hidden @ self.down.weight.t() + self.down.bias


class CalledByHand(Block):
    """As that, by a function that razor takes over."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(self.norm(x)))
        return F.linear(hidden, self.down.weight, self.down.bias)


def test_a_weight_used_without_its_layer_is_named() -> None:
    model = get_razor_model(TiedByHand())
    x = torch.randn(3, 8)
    with torch.no_grad():
        model(x)
    with pytest.warns(UserWarning, match="without calling the layer: down$"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        get_razor_model(Block())(x)
        get_razor_model(CalledByHand())(x)


@pytest.mark.parametrize("name", ["gpt2", "t5", "albert", "bart"])
def test_tied_and_repeated_weights_are_no_reason_to_warn(name: str) -> None:
    model, batch = make(name)
    get_razor_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, use_cache=False) if name != "albert" else model(**batch)


def test_a_cache_kept_in_training_gets_a_notice() -> None:
    model, batch = make("gpt2")
    get_razor_model(model)
    with pytest.warns(UserWarning, match="use_cache = False"):
        model(**batch)


def test_multihead_attention_is_named() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match="without calling them: self_attn"):
        get_razor_model(model, RazorConfig.preset("paper"))
    assert "self_attn.out_proj" not in dict(model.razor_modules())
    model(torch.randn(2, 3, 8, requires_grad=True)).sum().backward()


def test_a_linear_layer_of_another_kind_is_named() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.t())

    class Usual(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    model = get_razor_model(nn.Sequential(nn.Linear(4, 4), Odd(4, 4), Usual(4, 4)), RazorConfig.preset("paper"))
    with pytest.warns(UserWarning, match="Odd has a forward of its own: 1$"):
        model.memory_report(input=torch.randn(3, 4))
    assert [name for name, _ in model.razor_modules()] == ["0", "2"]


def test_activation_checkpointing_gets_a_notice_and_the_same_gradients() -> None:
    model, batch = make("bert")
    get_razor_model(model)
    expected = gradients(model, batch)
    checkpointed, _ = make("bert")
    checkpointed.load_state_dict(model.state_dict())
    get_razor_model(checkpointed)
    checkpoint_activations(checkpointed)
    with pytest.warns(UserWarning, match="activation checkpointing is on"):
        grads = gradients(checkpointed, batch)
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name


def test_remove_razor_gives_the_plain_model_back_with_its_weights() -> None:
    model, batch = make("gpt2")
    plain = copy.deepcopy(model)
    get_razor_model(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step(
        lambda: (lambda out: (out.backward(), out)[1])(model(**batch).loss)
    )
    trained = copy.deepcopy(model.state_dict())
    model.remove_razor()
    assert type(model) is type(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in plain.modules()]
    assert not model._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(trained.values(), model.state_dict().values(), strict=True))
    plain.load_state_dict(trained)
    for name, grad in gradients(plain, batch).items():
        assert torch.equal(gradients(model, batch)[name], grad)


def saved_for_backward(model: nn.Module, **batch: Tensor) -> int:
    """Bytes saved by a forward in the model's present mode, parameters and batch left out."""
    known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers(), *batch.values())}
    storages = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = model(**batch)
    del output
    return sum(size for key, size in storages.items() if key not in known)


def test_nothing_is_packed_in_eval_mode_or_without_gradients() -> None:
    model, batch = make("bert")
    plain = copy.deepcopy(model).eval()
    get_razor_model(model).eval()
    assert saved_for_backward(model, **batch) == saved_for_backward(plain, **batch)
    model.train()
    with torch.no_grad():
        assert saved_for_backward(model, **batch) == 0
    for name, grad in gradients(plain, batch).items():
        assert torch.equal(gradients(model.eval(), batch)[name], grad)


def test_an_input_that_only_a_frozen_weight_needs_is_not_stored() -> None:
    model, batch = make("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    report = get_razor_model(model).memory_report(**batch)
    assert report.by_kind.get("linear", (0, 0))[1] == 0
    assert report.by_kind["norm"][1] > 0


def test_memory_report_agrees_with_an_independent_count_and_leaves_no_trace() -> None:
    model, batch = make("bert")
    dense = saved_for_backward(model, **batch)
    get_razor_model(model, RazorConfig.preset("paper")).eval()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = model.memory_report(**batch)
    assert isinstance(report, MemoryReport)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert report.dense_bytes == dense == sum(row.dense_bytes for row in report.modules)
    assert report.razor_bytes == saved_for_backward(model.train(), **batch)
    assert measure_saved_bytes(model, **batch).total == report.razor_bytes
    assert {row.kind for row in report.modules} == {"linear", "norm", "activation", "dropout", "attention", "other"}
    data = report.to_dict()
    assert data["razor_bytes"] == sum(kind["razor_bytes"] for kind in data["by_kind"].values())
    text = str(report)
    assert all(word in text for word in ("linear", "attention", "total", "dense MiB", "razor MiB"))
    assert all(row.name in report.to_string(modules=None) for row in report.modules)


class Viewed(nn.Module):
    """A layer between other layers' output and what reads it in another shape."""

    def __init__(self, layers: Callable[[], list[nn.Module]], view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.view = nn.Sequential(*layers()), nn.Linear(64, 64), view

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.view(self.before(x)))


@pytest.mark.parametrize(
    "view",
    [lambda x: x.view(-1, 64), lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, 2, 64), lambda x: x[None]],
    ids=["view", "flatten", "reshape", "unsqueeze"],
)
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.LayerNorm(64)],
        lambda: [nn.Linear(64, 64), nn.GELU()],
        lambda: [nn.LayerNorm(64), nn.Dropout(0.5)],
        lambda: [nn.Linear(64, 64), nn.SiLU(), nn.Dropout(0.5)],
    ],
    ids=["norm", "activation", "dropped norm", "dropped activation"],
)
def test_views_of_a_tensor_are_restored_as_it_is(layers: Callable, view: Callable) -> None:
    x = torch.randn(4, 16, 64)
    results = []
    for each in (lambda x: x, view):
        model = get_razor_model(Viewed(layers, each).train())
        saved = measure_saved_bytes(model, x=x).total
        torch.manual_seed(0)
        model(x).square().sum().backward()
        results.append((saved, [p.grad for p in model.parameters()]))
    (plain, expected), (viewed, found) = results
    assert viewed == plain
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_view_of_other_rows_is_packed_by_itself() -> None:
    x = torch.randn(4, 16, 64)
    for view in (lambda x: x.view(4, 32, 32).repeat(1, 1, 2), lambda x: x.transpose(0, 1), lambda x: x[:, 3:]):
        model = Viewed(lambda: [nn.LayerNorm(64)], view).train()
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        get_razor_model(model)(x).square().sum().backward()
        found = [p.grad for p in model.parameters()]
        assert all(
            torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9 for a, b in zip(found, expected, strict=True)
        )


def test_shared_input_of_q_k_and_v_is_stored_once() -> None:
    model, batch = make("bert")
    report = get_razor_model(model, RazorConfig.preset("lossless")).memory_report(**batch)
    size = {row.name: row.razor_bytes for row in report.modules}
    layer = "bert.encoder.layer.1.attention.self"
    assert size[f"{layer}.query"] > 0
    assert f"{layer}.key" not in size
    assert f"{layer}.value" not in size


def test_disable_razor_saves_dense_and_comes_back() -> None:
    model, batch = make("bert")
    dense = saved_for_backward(model, **batch)
    get_razor_model(model)
    with model.disable_razor():
        assert saved_for_backward(model, **batch) == dense
    assert saved_for_backward(model, **batch) < dense / 3
    with pytest.raises(ValueError, match="input_ids"), model.disable_razor():
        model()
    assert saved_for_backward(model, **batch) < dense / 3


def test_min_numel_leaves_small_tensors_alone() -> None:
    model, batch = make("bert")
    dense = saved_for_backward(model, **batch)
    get_razor_model(model, RazorConfig(min_numel=10**9))
    assert saved_for_backward(model, **batch) == dense


def test_a_module_used_twice_in_one_forward() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x) * 1.5)

    dense = Twice()
    razor = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless"))
    x = torch.randn(5, 8)
    expected = torch.autograd.grad(dense(x).square().sum(), list(dense.parameters()))
    grads = torch.autograd.grad(razor(x).square().sum(), list(razor.parameters()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_accumulating_twice_doubles_the_gradient() -> None:
    model, batch = make("vit")
    get_razor_model(model)
    once = gradients(model, batch)
    torch.manual_seed(3)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "gemma"])
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    dense, batch = make(name)
    dense = dense.to(dtype)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    razor = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless"))
    expected, grads = gradients(dense, batch), gradients(razor, batch)
    for parameter, grad in expected.items():
        assert grads[parameter].dtype == dtype
        scale = grad.abs().max() + 1e-3
        assert (grads[parameter] - grad).abs().max() <= 0.05 * scale, parameter
    razor.remove_razor()
    for config in (RazorConfig.preset("paper"), RazorConfig()):
        get_razor_model(razor, config)
        torch.manual_seed(3)
        output = razor(**batch)
        torch.manual_seed(3)
        assert torch.equal(output.logits, dense(**batch).logits)
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in razor.parameters() if p.grad is not None)
        razor.remove_razor()


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_autocast(name: str) -> None:
    dense, batch = make(name)
    razor = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless"))
    outputs = []
    for model in (dense, razor):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model(**batch))
        outputs[-1].loss.backward()  # outside of autocast, as is advised
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for (parameter, expected), grad in zip(dense.named_parameters(), razor.parameters(), strict=True):
        if expected.grad is not None:
            assert grad.grad.dtype == expected.grad.dtype
            scale = expected.grad.abs().max() + 1e-3
            assert (grad.grad - expected.grad).abs().max() <= 0.05 * scale, parameter


def test_sinks_that_the_attention_function_reads_from_its_module_get_their_gradient() -> None:
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        use_cache=False,
    )
    dense = GptOssForCausalLM._from_config(config, attn_implementation="eager").train()
    tokens = torch.randint(64, (2, 9))
    batch = {"input_ids": tokens, "labels": tokens}
    expected = gradients(dense, batch)
    grads = gradients(get_razor_model(dense, RazorConfig.preset("lossless")), batch)
    sinks = "model.layers.0.self_attn.sinks"
    assert expected[sinks].any()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_that_takes_other_paths_by_name_is_left_alone_and_named() -> None:
    if not hasattr(transformers, "DeepseekV32Config"):
        pytest.skip("this Transformers has no such model")
    config = transformers.DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        index_topk=3,
        index_n_heads=2,
        index_head_dim=8,
    )
    dense = transformers.DeepseekV32ForCausalLM._from_config(config).eval()
    tokens = torch.randint(64, (2, 9))
    expected = dense(tokens).logits
    with pytest.warns(UserWarning, match="takes other paths by the name of its attention function: model.layers.0"):
        razor = get_razor_model(dense, RazorConfig.preset("paper"))
    assert torch.equal(razor(tokens).logits, expected)


def test_leaving_training_before_backward_does_not_change_the_gradient() -> None:
    model, batch = make("bert", "eager")
    get_razor_model(model)
    expected = gradients(model, batch)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch).loss
    model.eval()
    loss.backward()
    for name, grad in expected.items():
        assert torch.equal(dict(model.named_parameters())[name].grad, grad), name


def test_an_attention_function_of_somebody_elses_is_recomputed_even_in_paper_form() -> None:
    def half(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
        return F.scaled_dot_product_attention(query, key * 0.5, value).transpose(1, 2), None

    AttentionInterface.register("half", half)
    dense, batch = make("bert")
    dense.set_attn_implementation("half")
    expected = gradients(dense, batch)
    everything = RazorConfig.preset("paper", sparsity=0.0, value_dtype="auto", activation_bits=32)
    grads = gradients(get_razor_model(dense, everything), batch)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_without_a_stated_epsilon(dtype: torch.dtype) -> None:
    dense = nn.Sequential(nn.RMSNorm(8)).to(dtype)
    razor = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless"))
    inputs = [
        (1e-3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)).requires_grad_()
        for _ in "ab"
    ]
    grads = [torch.autograd.grad(m(x).sin().sum(), x)[0] for m, x in zip((dense, razor), inputs, strict=True)]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("default", ["meta device", "bfloat16"])
def test_norms_are_recognised_whatever_the_defaults(default: str) -> None:
    model, _ = make("llama")
    before = torch.get_default_dtype()
    try:
        if default == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
            get_razor_model(model)
        else:
            with torch.device("meta"):
                get_razor_model(model)
    finally:
        torch.set_default_dtype(before)
    assert replaced(model, "norm")


def test_meta_model_in_training() -> None:
    model, batch = make("bert")
    get_razor_model(model).to("meta")
    del batch["attention_mask"]  # Transformers reads its values
    assert model(**{name: value.to("meta") for name, value in batch.items()}).loss.device.type == "meta"


def test_a_function_without_a_rule_under_autocast() -> None:
    model = get_razor_model(nn.Sequential(nn.Linear(8, 8), nn.PReLU()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(4, 8))
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_activation_of_act2fn_is_handled() -> None:
    from transformers.activations import ACT2CLS, ACT2FN

    for name in ACT2CLS:
        function = ACT2FN[name].float()
        if name == "linear":  # saves nothing
            continue
        assert RazorActivation.handles(function), name
        dense = nn.Sequential(nn.Linear(8, 8), function)
        for bits, tolerance in ((32, 1e-5), (8, 0.05), (4, 0.15)):
            razor = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless", activation_bits=bits))
            x = torch.randn(64, 8)
            assert torch.equal(razor(x), dense(x)), name
            grads = torch.autograd.grad(razor(x).sum(), list(razor.parameters()))
            expected = torch.autograd.grad(dense(x).sum(), list(dense.parameters()))
            for a, b in zip(grads, expected, strict=True):
                assert (a - b).norm() <= tolerance * b.norm() + 1e-5, (name, bits)


def test_a_module_outside_of_transformers() -> None:
    model = get_razor_model(Block(), RazorConfig.preset("paper"))
    assert {type(m).__name__ for _, m in model.razor_modules()} == {"RazorLayerNorm", "RazorLinear", "RazorGELU"}
    model(torch.randn(4, 8)).sum().backward()


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_weight_gradients_by_integers_replace_those_by_floats(name: str, monkeypatch) -> None:
    # Where the processor has no fast product of integers, its slow one must do here.
    monkeypatch.setattr("hf_backrazor.packing.integers.has_integer_products", lambda: True)
    model, batch = make(name)
    get_razor_model(model, RazorConfig(weight_gradient="int8"))
    model.train()
    found, again, other = gradients(model, batch), gradients(model, batch), gradients(model, batch, seed=4)
    # The same codes, multiplied as floats.
    monkeypatch.setattr("hf_backrazor.packing.integers.has_integer_products", lambda: False)
    expected = gradients(model, batch)
    changed = 0
    for key, grad in found.items():
        assert torch.equal(grad, again[key])  # a seed fixes the rounding
        changed += not torch.equal(grad, expected[key])
        assert (grad - expected[key]).norm() <= 0.15 * expected[key].norm() + 1e-6, key
    assert changed >= 4
    assert any(not torch.equal(grad, other[key]) for key, grad in found.items())


def test_attention_in_training_answers_output_attentions_as_sdpa_does() -> None:
    model, batch = make("bert")
    get_razor_model(model)
    output = model(**batch, output_attentions=True)
    plain, _ = make("bert")
    expected = plain(**batch, output_attentions=True)
    assert output.attentions == expected.attentions


def test_saving_writes_the_settings_beside_plain_weights(tmp_path) -> None:
    model, _ = make("bert")
    plain = copy.deepcopy(model)
    get_razor_model(model, RazorConfig(sparsity=0.97)).save_pretrained(tmp_path / "razor")
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "razor/config.json").read_text() == (tmp_path / "plain/config.json").read_text()
    assert (tmp_path / "razor/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert RazorConfig.from_pretrained(tmp_path / "razor") == model.razor_config
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "razor")
    assert not isinstance(loaded, RazorModel)


def test_deepcopy_is_independent() -> None:
    model, batch = make("bert")
    get_razor_model(model)
    twin = copy.deepcopy(model)
    model.remove_razor()
    assert isinstance(twin, RazorModel)
    assert isinstance(twin.bert.encoder.layer[0].attention.self, RazorAttention)
    assert isinstance(twin.classifier, RazorLinear)
    assert twin.memory_report(**batch).razor_bytes < twin.memory_report(**batch).dense_bytes / 3


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, hf_backrazor; "
        "heavy = {'triton', 'datasets', 'peft', 'evaluate', 'transformers', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy; "
        # Transformers imports the compiler, and the compiler Triton where that is installed.
        "from transformers import activations, modeling_utils; before = set(sys.modules); "
        "from hf_backrazor import RazorConfig, get_razor_model; new = set(sys.modules) - before; "
        "heavy = {'triton', 'hf_backrazor.kernels.triton', 'datasets', 'peft', 'evaluate'} & new; "
        "assert not heavy, heavy; import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="the compiler of torch 2.11 recurses without end")
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "resnet"])
def test_models_export_in_eval_mode(name: str) -> None:
    """Strictly: in one graph, by the compiler's tracing."""
    model, batch = make(name)
    get_razor_model(model).eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    model.config.use_cache = False
    torch._dynamo.reset()
    exported = torch.export.export(model, (), inputs, strict=True)
    assert torch.equal(exported.module()(**inputs).logits, model(**inputs).logits)
