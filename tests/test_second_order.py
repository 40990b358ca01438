"""Gradients of gradients: autograd's, or an error; never something else."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import hf_backrazor.functional
from hf_backrazor import RazorConfig, get_razor_model


def critic(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.SiLU()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x)) * self.scale


IMAGES, TOKENS = (4, 3, 12, 12), (4, 5, 8)
# Every one of these can be differentiated twice at lossless storage.
CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: critic(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.ReLU()), TOKENS),
    "layer norm": (lambda: critic(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8)), TOKENS),
    "two dimensions": (lambda: critic(nn.Linear(8, 16), nn.LayerNorm((5, 16)), nn.Tanh(), nn.Linear(16, 8)), TOKENS),
    "rms norm": (lambda: critic(nn.Linear(8, 16), nn.RMSNorm(16), nn.SiLU(), nn.Linear(16, 8)), TOKENS),
    "gated": (lambda: critic(Gated()), TOKENS),
    "elu": (lambda: critic(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 8), nn.Sigmoid()), TOKENS),
    "prelu": (lambda: critic(nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 8)), TOKENS),
    "convolution": (lambda: critic(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3, 2)), IMAGES),
    "even kernel": (lambda: critic(nn.Conv2d(3, 8, 2, padding="same"), nn.LeakyReLU(0.2)), IMAGES),
    "transposed": (lambda: critic(nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU()), IMAGES),
    "batch norm": (lambda: critic(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), IMAGES),
    "group norm": (lambda: critic(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Mish()), IMAGES),
    "instance norm": (lambda: critic(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU()), IMAGES),
    "pooling": (lambda: critic(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.ZeroPad2d(1)), IMAGES),
    "dropout": (lambda: critic(nn.Linear(8, 16), nn.Dropout(0.3), nn.LeakyReLU(0.2)), TOKENS),
}
# And these also where activations are packed: the gradient of their input reads none.
READ_NOTHING = ("perceptron", "convolution", "even kernel", "transposed", "pooling", "dropout")


def pair(name: str, preset: str) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = CRITICS[name]
    torch.manual_seed(0)
    dense, x = make(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        dense.double()(x)
    dense.train()
    return dense, get_razor_model(copy.deepcopy(dense), RazorConfig.preset(preset)), x


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    """WGAN-GP's: how far the norm of the critic's gradient is from 1."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def assert_same_gradients(dense: nn.Module, razor: nn.Module) -> None:
    for (name, expected), found in zip(dense.named_parameters(), razor.parameters(), strict=True):
        # A gradient that is zero whatever the parameters are may be missing.
        wanted, got = (torch.zeros_like(p) if p.grad is None else p.grad for p in (expected, found))
        assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("name", CRITICS)
def test_a_gradient_penalty_is_autograds_at_lossless_storage(name: str) -> None:
    dense, razor, x = pair(name, "lossless")
    for model in (dense, razor):
        penalty(model, x).backward()
    assert_same_gradients(dense, razor)


@pytest.mark.parametrize("preset", ["balanced", "fast", "paper"])
@pytest.mark.parametrize("name", CRITICS)
def test_a_gradient_penalty_is_autograds_or_an_error(name: str, preset: str) -> None:
    dense, razor, x = pair(name, preset)
    penalty(dense, x).backward()
    if name in READ_NOTHING:
        penalty(razor, x).backward()
        assert_same_gradients(dense, razor)
    elif preset == "paper" and name in ("batch norm", "instance norm"):
        # Their inputs are whole there; below them is a convolution, whose weight's gradient is pruned as always.
        penalty(razor, x).backward()
        assert torch.allclose(razor[1].weight.grad, dense[1].weight.grad)
    else:
        with pytest.raises(RuntimeError, match=r"razor: .*create_graph"):
            penalty(razor, x).backward()


def test_the_norm_of_a_weights_gradient_is_refused_where_its_input_is_packed() -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 4)), torch.randn(6, 8)
    lossless, balanced = (
        get_razor_model(copy.deepcopy(dense), RazorConfig.preset(p)) for p in ("lossless", "balanced")
    )
    for model in (dense, lossless):
        grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    assert_same_gradients(dense, lossless)
    for parameters in (list(balanced.parameters()), [balanced[2].weight]):
        with pytest.raises(RuntimeError, match=r"razor: .*create_graph"):
            torch.autograd.grad(balanced(x).square().sum(), parameters, create_graph=True)
    # The first layer's input is no function of anything.
    for model in (dense, balanced):
        (grad,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
        model.product = torch.autograd.grad(grad.square().sum(), model[2].weight)
    assert torch.nn.functional.cosine_similarity(dense.product[0].flatten(), balanced.product[0].flatten(), 0) > 0.9


def test_create_graph_is_refused_at_once_where_nothing_can_be_differentiated() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    batch = {"input_ids": torch.randint(50, (2, 7)), "labels": torch.tensor([0, 1])}
    model = get_razor_model(BertForSequenceClassification(config).train())
    with pytest.raises(RuntimeError, match=r"razor: .*create_graph"):
        model(**batch).loss.backward(create_graph=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_hessian_vector_product_of_a_transformer_at_lossless_storage(attention: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    dense = ViTForImageClassification(config).double().train()
    dense.set_attn_implementation(attention)
    razor, x = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless")), torch.randn(2, 3, 16, 16).double()
    products = []
    for model in (dense, razor):
        parameters = list(model.parameters())
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice, dense either
            grads = torch.autograd.grad(model(x).logits.sin().sum(), parameters, create_graph=True)
            products.append(torch.autograd.grad(grads, parameters, [torch.ones_like(p) for p in parameters]))
    for expected, found in zip(*products, strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_what_is_computed_again_reads_the_parameters_of_its_forward() -> None:
    torch.manual_seed(0)
    model = get_razor_model(nn.Sequential(nn.Linear(3, 5), nn.PReLU(5)), RazorConfig.preset("lossless"))
    parameters = {name: p.detach().clone().mul_(2).requires_grad_() for name, p in model.named_parameters()}
    expected = [p.detach().clone().requires_grad_() for p in parameters.values()]
    x = torch.randn(4, 3)
    torch.func.functional_call(model, parameters, (x,)).square().sum().backward()
    torch.nn.functional.prelu(torch.nn.functional.linear(x, *expected[:2]), expected[2]).square().sum().backward()
    for found, wanted in zip(parameters.values(), expected, strict=True):
        assert torch.allclose(found.grad, wanted.grad)


def test_a_hook_runs_once_however_often_a_gradient_is_differentiated() -> None:
    dense, razor, x = pair("prelu", "lossless")
    for model in (dense, razor):
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: 2 * grad)
        hidden: list[Tensor] = []
        model[0].register_forward_hook(lambda module, args, y, hidden=hidden: hidden.append(y * 1) or hidden[-1])
        y = model(x)
        hidden[-1].register_hook(lambda grad: 3 * grad)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()), create_graph=True)
        model.seen = [grad.detach() for grad in grads]
        model.zero_grad()
        sum(grad.square().sum() for grad in grads).backward()
    for expected, found in zip(dense.seen, razor.seen, strict=True):
        assert torch.allclose(found, expected)
    assert_same_gradients(dense, razor)


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_a_batch_of_gradients_is_refused_in_words(preset: str) -> None:
    model = get_razor_model(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), RazorConfig.preset(preset))
    x = torch.randn(5, 4, requires_grad=True)
    y = model(x).sum(0)
    with pytest.raises(RuntimeError, match=r"razor: the backward of .* one gradient at a time"):
        torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)


def test_transforms_of_torch_func_run_the_plain_code() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    razor = get_razor_model(copy.deepcopy(dense))

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    x = torch.randn(5, 2, 4)
    for name, grad in gradients(dense).items():
        assert torch.equal(gradients(razor)[name], grad)


def test_nested_tensors_run_the_plain_code() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    razor = get_razor_model(copy.deepcopy(dense))
    for model in (dense, razor):
        x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(5, 4)], layout=torch.jagged)
        model(x).values().sum().backward()
    assert_same_gradients(dense, razor)


def test_sparse_tensors_run_the_plain_code() -> None:
    dense = nn.Sequential(nn.Linear(8, 8, bias=False))
    razor = get_razor_model(copy.deepcopy(dense))
    for model in (dense, razor):
        model(torch.eye(8).to_sparse()).sum().backward()
    assert_same_gradients(dense, razor)


def test_every_backward_says_whether_it_can_be_differentiated() -> None:
    functions = []
    for info in pkgutil.iter_modules(hf_backrazor.functional.__path__):
        module = importlib.import_module(f"hf_backrazor.functional.{info.name}")
        functions += [
            each
            for _, each in inspect.getmembers(module, inspect.isclass)
            if issubclass(each, torch.autograd.Function) and each.__module__ == module.__name__
        ]
    assert len(functions) > 15
    silent = [each.__qualname__ for each in functions if not hasattr(each.backward, "differentiable")]
    assert silent == []


def test_a_hessian_vector_product() -> None:
    dense, razor, x = pair("layer norm", "lossless")
    products = []
    for model in (dense, razor):
        parameters = list(model.parameters())
        loss = F.binary_cross_entropy_with_logits(model(x), torch.ones(4, 1, dtype=torch.float64))
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        vector = [torch.ones_like(p) for p in parameters]
        products.append(torch.autograd.grad(grads, parameters, vector))
    for expected, found in zip(*products, strict=True):
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_forward_mode_runs_the_plain_code() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    razor = get_razor_model(copy.deepcopy(dense))
    x, tangent = torch.randn(2, 5, 4)
    found = []
    for model in (dense, razor):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*found)


def test_a_second_derivative_of_maps_with_their_channels_last() -> None:
    torch.manual_seed(0)

    class Rolled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).roll(1, -1)

    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4)):
        dense = nn.Sequential(Rolled(norm), nn.Hardtanh(), nn.Conv2d(4, 3, 1, padding=2)).double().train()
        x = (3 * torch.randn(1, 4, 3, 4).double()).to(memory_format=torch.channels_last)
        found = []
        for model in (dense, get_razor_model(copy.deepcopy(dense), RazorConfig.preset("lossless"))):
            grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()), create_graph=True)
            found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), model[0][0].weight)[0])
        assert torch.allclose(*found)
