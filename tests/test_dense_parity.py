"""What runs dense runs with razor, with the same results; what raises dense raises with razor."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from transformers import (
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.functional import dropout


def razor_of(dense: nn.Module, preset: str = "lossless", **changes: Any) -> nn.Module:
    return get_razor_model(copy.deepcopy(dense).train(), RazorConfig.preset(preset, **changes))


def gradients(model: nn.Module, *inputs: Tensor, seed: int = 1) -> list[Tensor]:
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    torch.manual_seed(seed)
    y = model(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [x for x in (*inputs, *model.parameters()) if x.requires_grad]
    return list(torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True))


def assert_equal_gradients(dense: nn.Module, razor: nn.Module, *inputs: Tensor, rtol: float = 1e-5) -> None:
    for expected, found in zip(gradients(dense, *inputs), gradients(razor, *inputs), strict=True):
        assert torch.allclose(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max() + 1e-6))


@pytest.mark.parametrize("length", [16, 12])
@pytest.mark.parametrize("weight_gradient", ["dense", "int8"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.GroupNorm(4, 16), nn.InstanceNorm1d(16, affine=True)])
def test_a_linear_layer_reads_what_a_norm_over_channels_stored(
    norm: nn.Module, weight_gradient: str, length: int
) -> None:
    torch.manual_seed(0)
    norm = copy.deepcopy(norm)
    with torch.no_grad():
        norm.weight.normal_(1), norm.bias.normal_()
    dense = nn.Sequential(nn.Linear(length, length), norm, nn.Linear(length, 8)).train()
    razor = razor_of(dense, "balanced", norm_bits=4, residual_bits=4, weight_gradient=weight_gradient)
    x = torch.randn(32, 16, length)
    expected, found = (gradients(model, x)[5].flatten() for model in (dense, razor))
    assert F.cosine_similarity(expected, found, 0) > 0.98


@pytest.mark.parametrize("preset", ["lossless", "balanced", "paper"])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (1, 4)),
        (nn.BatchNorm1d(4), (1, 4, 1)),
        (nn.BatchNorm2d(4), (1, 4, 1, 1)),
        (nn.InstanceNorm1d(4), (2, 4, 1)),
        (nn.InstanceNorm2d(4), (2, 4, 1, 1)),
        (nn.GroupNorm(4, 4), (1, 4, 1, 1)),
    ],
)
def test_norms_of_one_value_are_refused_as_they_are_dense(norm: nn.Module, shape: tuple[int, ...], preset: str) -> None:
    dense = nn.Sequential(copy.deepcopy(norm))
    razor = razor_of(dense, preset)
    x = torch.randn(shape, requires_grad=True)
    for model in (dense, razor):
        with pytest.raises(ValueError, match="Expected more than 1"):
            model(x)
    for expected, found in zip(dense.buffers(), razor.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
@pytest.mark.parametrize("kernel", [2, (4, 3), (3, 2)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_even_kernels_pad_as_torch_does(kernel: Any, dilation: Any, preset: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, kernel, padding="same", dilation=dilation))
    razor, x = razor_of(dense, preset), torch.randn(2, 3, 9, 8)
    assert torch.equal(razor(x), dense(x))
    if preset == "lossless":
        assert_equal_gradients(dense, razor, x)
    else:
        assert torch.allclose(gradients(razor, x)[0], gradients(dense, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
@pytest.mark.parametrize(
    "activation",
    [nn.ELU, nn.SELU, nn.CELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid],
)
def test_activation_functions_work_in_place(activation: Callable[..., nn.Module], preset: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv1d(3, 8, 1), activation(inplace=True), nn.Conv1d(8, 3, 1))
    razor, x = razor_of(dense, preset), torch.randn(2, 3, 9)
    assert torch.equal(razor(x), dense(x))
    if preset == "lossless":
        assert_equal_gradients(dense, razor, x)


class ChangedAfter(nn.Module):
    """A layer whose output, or input, somebody changes in place."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Any], what: str) -> None:
        super().__init__()
        self.first, self.layer, self.change, self.what = nn.Linear(8, 8), layer, change, what

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * 1
        y = self.layer(x)
        if self.what == "output":
            self.change(y)
            return y
        self.change(x)
        return y.sum() + x.sum()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda y: y.add_(1.0),
    "mul": lambda y: y.mul_(2.0),
    "relu": lambda y: F.relu(y, inplace=True),
    "index": lambda y: y.__setitem__((slice(None), 0), 0.0),
    "mask": lambda y: y.masked_fill_(y > 0.5, 0.25),
    "view": lambda y: y.view(-1).mul_(3.0),
    "iadd": lambda y: y.__iadd__(torch.ones(8)),
    "copy": lambda y: y.copy_(y.flip(0)),
}


@pytest.mark.parametrize("preset", ["lossless", "balanced", "fast", "paper"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 8),
        nn.Linear(8, 8, bias=False),
        Conv1D(8, 8),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.LeakyReLU(),
        nn.GELU(),
        nn.ELU(),
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.ConvTranspose1d(4, 4, 1),
        nn.ConstantPad1d((1, -1), 0.0),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_outputs_may_be_changed_in_place_where_the_plain_layers_may(layer: nn.Module, change: str, preset: str) -> None:
    torch.manual_seed(0)
    dense = ChangedAfter(copy.deepcopy(layer), CHANGES[change], "output").train()
    x = torch.randn(2, 4, 8)
    try:
        expected = gradients(dense, x)
    except RuntimeError:
        pytest.skip("not for the plain layer")
    razor = razor_of(dense, preset)
    found = gradients(razor, x)
    torch.manual_seed(1)
    y = dense(x)
    torch.manual_seed(1)
    assert torch.equal(razor(x), y)
    if preset == "lossless":
        for pair in zip(found, expected, strict=True):
            assert torch.allclose(*pair, rtol=1e-4, atol=1e-5)


class CastingNorm(nn.Module):
    """RMSNorm as Transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), CastingNorm(), nn.Dropout(0.5), nn.Softmax(-1)])
def test_inputs_may_be_changed_in_place_where_the_plain_layers_may(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    dense = ChangedAfter(layer, lambda x: x.mul_(2), "input").train().bfloat16()
    razor = razor_of(dense)
    assert_equal_gradients(dense, razor, torch.randn(2, 4, 8).bfloat16(), rtol=2e-2)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(8), nn.SiLU()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("second", [nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True), nn.ELU(inplace=True)])
@pytest.mark.parametrize("first", [nn.Sigmoid(), nn.Tanh(), nn.Softmax(-1)])
def test_changes_in_place_under_checkpointing(first: nn.Module, second: nn.Module) -> None:
    torch.manual_seed(0)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(first, second)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    dense, x = Checkpointed(), torch.randn(3, 5, 8)
    assert_equal_gradients(dense, razor_of(dense), x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", ["lossless", "balanced", "fast", "paper"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_gated_mlp_under_checkpointing(preset: str, reentrant: bool, dropout: float) -> None:
    torch.manual_seed(0)
    model = razor_of(nn.Sequential(GatedMLP(), nn.Dropout(dropout), nn.GELU(), nn.Linear(8, 3)), preset)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    x = torch.randn(3, 5, 8)
    for expected, found in zip(gradients(model, x), _backward(Checkpointed(), x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def _backward(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As `gradients`, by `backward`, which reentrant checkpointing needs."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def test_preparing_one_model_leaves_the_activation_functions_of_others() -> None:
    from transformers import activations

    config = XLMConfig(emb_dim=16, n_layers=1, n_heads=2, vocab_size=20)
    prepared, other = XLMWithLMHeadModel(config), XLMWithLMHeadModel(config)
    shared = other.transformer.ffns[0].act
    assert shared is activations.gelu
    get_razor_model(prepared)
    assert type(other.transformer.ffns[0].act) is type(activations.gelu) is activations.GELUActivation
    assert isinstance(prepared.transformer.ffns[0].act, activations.GELUActivation)
    assert "Razor" in type(prepared.transformer.ffns[0].act).__name__
    get_razor_model(other)  # and can be prepared as well
    config = OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    models = [OpenAIGPTLMHeadModel(config) for _ in range(2)]
    assert models[0].transformer.h[0].mlp.act is models[1].transformer.h[0].mlp.act
    get_razor_model(models[0])
    assert "Razor" not in type(models[1].transformer.h[0].mlp.act).__name__
    models[0].remove_razor()


class ChannelNorm(nn.Module):
    """RMSNorm over dimension 1, with its weight along the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight


class CountingNorm(CastingNorm):
    """RMSNorm that keeps statistics, and draws a number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen.add_(1)
        self.calls += 1
        torch.rand(1)
        return super().forward(hidden_states)


def test_a_norm_over_another_dimension_is_left_alone() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), ChannelNorm(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="ChannelNorm is neither LayerNorm nor RMSNorm"):
        get_razor_model(copy.deepcopy(dense), RazorConfig.preset("paper")).train()(torch.randn(2, 8, 8))
    razor = razor_of(dense)
    assert_equal_gradients(dense, razor, torch.randn(2, 8, 8))


def test_looking_at_a_norm_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), CountingNorm()).train()
    state = torch.get_rng_state()
    get_razor_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].seen == 0
    assert model[1].calls == 0


def test_arguments_may_be_given_by_the_plain_layers_names() -> None:
    x = torch.randn(2, 4, 8)
    layers = {
        "input": [
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Dropout(0.5),
            nn.GELU(),
            nn.ReLU(),
            nn.Conv1d(4, 4, 1),
            nn.BatchNorm1d(4),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm1d(4),
            nn.ConstantPad1d(1, 0.0),
        ],
        "x": [Conv1D(8, 8), nn.RMSNorm(8)],
        "hidden_states": [CastingNorm()],
    }
    for name, each in layers.items():
        model = nn.ModuleList(each)
        get_razor_model(model)
        for layer in model:
            layer.train()(**{name: x.clone().requires_grad_()}).sum().backward()


@pytest.mark.parametrize("normalise", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrizations_come_and_go_before_and_after(normalise: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(4, 8)
    normalised = copy.deepcopy(plain)
    normalise(normalised[0])
    expected = copy.deepcopy(normalised)(x)

    after = copy.deepcopy(plain)
    get_razor_model(after)
    torch.manual_seed(0)
    normalise(after[0])
    after(x).sum().backward()
    after.remove_razor()
    assert parametrize.is_parametrized(after[0])
    after(x)
    parametrize.remove_parametrizations(after[0], "weight")
    assert type(after[0]) is nn.Linear

    before = get_razor_model(normalised)
    assert torch.allclose(before(x), expected, rtol=1e-4, atol=1e-5)
    parametrize.remove_parametrizations(before[0], "weight")
    assert "RazorLinear" in {cls.__name__ for cls in type(before[0]).__mro__}
    before(x).sum().backward()
    before.remove_razor()
    assert type(before[0]) is nn.Linear


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)])
def test_a_parametrized_weight_is_computed_as_often_as_dense(layer: nn.Module) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(layer), nn.GELU()).train()
    parametrizations.spectral_norm(dense[1])
    razor, x = razor_of(dense), torch.randn(2, 4, 8)
    for _ in range(3):  # each a step of the power iteration
        assert torch.equal(razor(x), dense(x))
    dense.requires_grad_(False)
    razor.requires_grad_(False)
    assert torch.equal(razor(x), dense(x))
    for expected, found in zip(dense.buffers(), razor.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", ["lossless", "balanced", "fast", "paper"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 8), (0, 8)),
        (nn.LayerNorm(8), (0, 3, 8)),
        (nn.RMSNorm(8), (0, 8)),
        (nn.GELU(), (0, 8)),
        (nn.Dropout(0.5), (0, 8)),
        (nn.Conv2d(2, 3, 1), (0, 2, 4, 4)),
        (nn.BatchNorm2d(2), (0, 2, 5, 3)),
        (nn.InstanceNorm2d(2), (0, 2, 5, 3)),
        (nn.GroupNorm(1, 2), (0, 2, 5, 3)),
        (nn.MaxPool2d(2), (0, 2, 4, 4)),
        (nn.AvgPool2d(2), (0, 2, 4, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_empty_batches(layer: nn.Module, shape: tuple[int, ...], preset: str) -> None:
    dense = nn.Sequential(copy.deepcopy(layer)).train()
    razor, x = razor_of(dense, preset), torch.randn(shape)
    for expected, found in zip(gradients(dense, x), gradients(razor, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", ["lossless", "balanced", "paper"])
def test_a_norm_over_two_dimensions_of_a_slice(preset: str) -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.LayerNorm((4, 3))), torch.randn(2, 4, 5, 3)[:, :, 0]
    razor = razor_of(dense, preset)
    assert torch.equal(razor(x), dense(x))
    assert torch.allclose(gradients(razor, x)[2], gradients(dense, x)[2])


def test_an_interrupted_first_forward_leaves_no_mode_behind() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.interrupt = nn.Linear(4, 4), True

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            if self.interrupt:
                raise KeyboardInterrupt
            return x

    model = get_razor_model(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 4))
    assert _get_current_dispatch_mode() is None
    assert _get_current_function_mode() is None
    model.interrupt = False
    model(torch.randn(2, 4)).sum().backward()


def test_gradients_of_activations_are_plain_tensors() -> None:
    model = get_razor_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train())
    norm: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, y: norm.append(y))
    loss = model(torch.randn(2, 3, 8, 8)).square().sum()
    (grad,) = torch.autograd.grad(loss, norm)
    assert type(grad) is Tensor
    assert grad.numpy().shape == (2, 4, 8, 8)


def test_threads_draw_different_masks() -> None:
    # 600 draws of 4096 elements: each mask is drawn once.
    torch.manual_seed(0)
    ones, masks = torch.ones(64, 64, requires_grad=True), [[] for _ in range(6)]

    def draw(found: list[bytes]) -> None:
        for _ in range(100):
            found.append((dropout(ones, 0.5) != 0).numpy().tobytes())

    threads = [threading.Thread(target=draw, args=(found,)) for found in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({mask for found in masks for mask in found}) == 600


def test_inputs_of_few_rows_do_not_keep_what_they_were_taken_from() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.pooler = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.pooler(self.encoder(x)[:, 0]))

    model = get_razor_model(Pooled())
    hidden: list[weakref.ref] = []
    model.encoder.register_forward_hook(lambda module, args, y: hidden.append(weakref.ref(y.untyped_storage())))
    y = model(torch.randn(4, 100, 64))
    assert hidden[0]() is None
    y.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("preset", ["lossless", "balanced", "paper"])
def test_no_gradient_comes_from_no_gradient(preset: str) -> None:
    layers = [nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.GELU(), nn.ReLU(), nn.PReLU(), nn.Dropout(0.5)]
    layers += [nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(3), nn.MaxPool2d(2)]
    for layer in layers:
        model, x = razor_of(nn.Sequential(layer), preset), torch.randn(2, 4, 8, requires_grad=True)
        NoGradient.apply(model(x)).sum().backward()
        assert x.grad is None, layer
        assert all(parameter.grad is None for parameter in model.parameters()), layer


def test_group_norm_of_one_image_with_its_channels_last() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.GroupNorm(4, 4)).double()
    razor = razor_of(dense)
    x = torch.randn(1, 4, 3, 5).double().to(memory_format=torch.channels_last)
    assert_equal_gradients(dense, razor, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_epsilon_of_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.RMSNorm(8)).to(dtype)
    razor, x = razor_of(dense), (1e-3 * torch.randn(4, 8)).to(dtype)
    assert torch.equal(razor(x), dense(x))
    # In float32, where epsilon is the same, autograd's is exact enough to compare with.
    expected = gradients(dense.float() if dtype.itemsize < 4 else dense, x.float() if dtype.itemsize < 4 else x)
    for pair in zip(gradients(razor, x), expected, strict=True):
        assert F.cosine_similarity(*(each.double().flatten() for each in pair), 0) > 0.999


def test_an_input_without_a_gradient_may_be_changed_after_rms_norm() -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.RMSNorm(8)), torch.randn(3, 8)
    grads = []
    for model in (dense, razor_of(dense)):
        copied = x.clone()
        y = model(copied)
        copied.mul_(0.5)
        grads.append(torch.autograd.grad(y.square().sum(), list(model.parameters()))[0])
    assert torch.allclose(*grads)


def test_an_activation_function_with_tied_parameters() -> None:
    torch.manual_seed(0)
    act = ACT2FN["xielu"].float()
    act.alpha_p = act.alpha_n
    dense = nn.Sequential(nn.Linear(4, 8), act)
    assert_equal_gradients(dense, razor_of(dense), torch.randn(3, 4))


def test_a_norm_that_broadcasts_its_input() -> None:
    dense, x = nn.Sequential(CastingNorm()), torch.randn(2, 4, 1)
    assert_equal_gradients(dense, razor_of(dense), x)
