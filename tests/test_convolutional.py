"""Operators on feature maps: the dense forward to the bit; autograd's gradients where storage is lossless."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from hf_backrazor import RazorConfig, freeze_batch_norms, get_razor_model, measure_saved_bytes
from hf_backrazor.functional import (
    activation,
    batch_norm,
    convolution,
    dropout,
    group_norm,
    max_pool2d,
    scaling,
    zero_pad,
)
from hf_backrazor.functional.activation import HARDSIGMOID, RELU, RELU6, SILU, ActivationRule, leaky_relu
from hf_backrazor.functional.convolution import Geometry
from hf_backrazor.functional.layouts import RectifiedLayout
from hf_backrazor.functional.pooling import Window
from hf_backrazor.functional.sharing import origin_of, pack_shared
from hf_backrazor.packing import PackSpec, pack

LOSSLESS = PackSpec(row_dims=2)
CODED = PackSpec(0.99, bits=3, row_dims=2)

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "stride, padding": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same, dilated": lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed groups": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "1d transposed": lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1),
    "3d": lambda: nn.Conv3d(4, 6, 2),
}


def input_for(module: nn.Module, **options: object) -> Tensor:
    shape = (3, 4, 9, 7, 5)[: module.weight.dim()]
    return torch.randn(*shape, requires_grad=True, **options)


class Alone(nn.Module):
    """One layer, behind something that has a gradient."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 1.0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradcheck_convolution(name: str) -> None:
    model = get_razor_model(Alone(CONVOLUTIONS[name]().double()), RazorConfig.preset("lossless"))
    x = input_for(model.layer, dtype=torch.float64)
    names = [key for key, _ in model.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    # Numerical derivatives of the packed input are zero where the input is read from its copy: of all the others.
    assert gradcheck(call, (x, *model.parameters()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if "d" not in name[:2]])
def test_convolution_forward_is_bit_equal_and_input_gradients_exact(name: str, memory_format) -> None:
    plain = Alone(CONVOLUTIONS[name]()).to(memory_format=memory_format)
    razor = get_razor_model(copy.deepcopy(plain))
    x = input_for(plain.layer).detach().contiguous(memory_format=memory_format)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = razor(found), plain(expected)
    assert torch.equal(y, z)
    assert y.stride() == z.stride()
    grad = torch.randn_like(z)
    y.backward(grad)
    z.backward(grad)
    torch.testing.assert_close(found.grad, expected.grad)
    if plain.layer.bias is not None:
        torch.testing.assert_close(razor.layer.bias.grad, plain.layer.bias.grad)
    cosine = F.cosine_similarity(razor.layer.weight.grad.flatten(), plain.layer.weight.grad.flatten(), dim=0)
    assert cosine > 0.9


def test_slices_of_samples_make_the_whole_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = sys.modules["hf_backrazor.functional.convolution"].CONVOLUTION_NUMEL
    model = get_razor_model(Alone(nn.Conv2d(4, 6, 3)), RazorConfig())
    x = torch.randn(7, 4, 9, 9)
    grads = []
    for numel in (2**21, 2 * 4 * 81, 1):
        monkeypatch.setitem(slices, "cpu", numel)
        model.zero_grad()
        model(x.clone().requires_grad_()).square().sum().backward()
        grads.append(model.layer.weight.grad.clone())
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-4)


def test_a_single_image_without_a_batch_runs_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(3, 8, 8)
    expected = model(x)
    assert torch.equal(get_razor_model(model)(x), expected)


@pytest.mark.parametrize("stores", ["x_hat", "input"])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "fixed"])
def test_gradcheck_batch_norm(training: bool, affine: str, stores: str) -> None:
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = None if affine == "none" else torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if affine == "both" else None
    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training, 0.1, 1e-5, LOSSLESS, stores)

    assert gradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("shape", [(5, 4, 7), (3, 4, 9, 5), (2, 4, 3, 3, 5)], ids=str)
def test_batch_norm_forward_and_statistics_are_bit_equal(shape: tuple[int, ...], track: bool, momentum) -> None:
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 3]
    plain = Alone(kind(4, momentum=momentum, track_running_stats=track))
    razor = get_razor_model(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        assert torch.equal(razor(x.clone().requires_grad_()), plain(x.clone().requires_grad_()))
    for found, expected in zip(razor.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected)
    plain.eval()
    razor.eval()
    with torch.no_grad():
        assert torch.equal(razor(x), plain(x))


def test_fixed_statistics_save_nothing_but_what_a_trained_weight_needs() -> None:
    model = Alone(nn.BatchNorm2d(8))
    get_razor_model(model)
    x = torch.randn(4, 8, 16, 16)

    def saved() -> int:
        total = 0

        def note(t: Tensor) -> Tensor:
            nonlocal total
            total += t.untyped_storage().nbytes()
            return t

        model.layer.eval()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(x.clone().requires_grad_())
        return total

    with_weight = saved()
    assert x.numel() / 4 < with_weight < x.nbytes / 4
    model.layer.requires_grad_(False)
    assert saved() < 1024


def test_a_rectified_x_hat_restores_what_the_next_convolution_reads() -> None:
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    weight, bias = torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5, CODED)
    for rule, function in ((RELU, F.relu), (RELU6, F.relu6)):
        z = activation(y, function, rule, 4)
        origin = origin_of(z)
        assert isinstance(origin.layout, RectifiedLayout)
        restored = origin.unpack()
        assert restored.min() >= 0
        assert (restored - z).square().mean() < 0.05 * z.square().mean()
        # Slices are the rows of the whole.
        rows = origin.layout.unpack_rows(origin.parts, 3, 6, torch.float32)
        assert torch.equal(rows, restored.view(8, 81)[3:6])


class Rectified(nn.Module):
    """A batch norm and ReLU between convolutions; `between` is called with what is between the two."""

    def __init__(self, rectifier: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), rectifier
        self.last = nn.Conv2d(8, 4, 3)
        self.between = lambda y: 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        extra = self.between(y)
        return self.last(self.act(y)).square().sum() + extra


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_mask_is_applied_before_another_gradient_is_added() -> None:
    dense = Rectified(nn.ReLU()).train()
    razor = get_razor_model(copy.deepcopy(dense), RazorConfig.preset("balanced", sparsity=0.5, norm_bits=4))
    x = torch.randn(4, 3, 9, 7)
    for model in (dense, razor):
        model.between = lambda y: (y * torch.linspace(-1, 1, y.shape[-1])).sum()
    # The last convolution's weight is not exact, and so is nothing above the norm; its beta's gradient is.
    assert torch.allclose(gradients(razor, x)[3], gradients(dense, x)[3], rtol=1e-4)


def test_a_block_of_convolutions_stores_each_tensor_once() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    )
    model = get_razor_model(nn.Sequential(nn.Conv2d(3, 16, 1), block))
    x = torch.randn(4, 3, 32, 32)
    report = {row.name: row for row in model.memory_report(input=x).modules}
    elements = 4 * 16 * 32 * 32
    # x_hat in 3 bits and a little; 1 bit for ReLU; nothing for the convolution that reads its output.
    assert report["1.1"].razor_bytes < 3.6 * elements / 8
    assert report["1.2"].razor_bytes == elements / 8
    assert "1.3" not in report or report["1.3"].razor_bytes < 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d((2, 5), stride=(1, 2), dilation=(2, 1), ceil_mode=True),
        nn.MaxPool2d(7, padding=3),
        nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
    ],
    ids=str,
)
def test_max_pooling_is_exact(module: nn.Module, dtype: torch.dtype) -> None:
    plain = Alone(module)
    razor = get_razor_model(copy.deepcopy(plain))
    x = torch.randn(2, 3, 19, 17).to(dtype)
    x[0, 0, :9] = 1.0  # ties
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = razor(found), plain(expected)
    assert torch.equal(y, z)
    grad = torch.randn_like(z)
    y.backward(grad)
    z.backward(grad)
    assert torch.equal(found.grad, expected.grad)
    saved = measure_saved_bytes(razor, x=x.clone().requires_grad_()).total
    assert saved <= z.numel() * (1 if razor.layer.kernel_size == 7 else 0.5) + 8


def test_pooled_windows_reach_into_the_padding() -> None:
    x = torch.full((1, 1, 4, 4), -5.0, requires_grad=True)
    window = Window((3, 3), (2, 2), (1, 1), (1, 1), False)
    max_pool2d(x, window).sum().backward()
    expected = torch.full((1, 1, 4, 4), -5.0, requires_grad=True)
    F.max_pool2d(expected, 3, 2, 1).sum().backward()
    assert torch.equal(x.grad, expected.grad)


@pytest.mark.parametrize("spec", [CODED, PackSpec(0.9, "sample", value_dtype="float16", row_dims=2)])
def test_maps_pack_by_planes(spec: PackSpec) -> None:
    """As the same numbers do in a matrix that has a row for each plane."""
    x = torch.randn(3, 4, 6, 5)
    packed, flat = pack(x, spec), pack(x.view(3, 4, 30), replace(spec, row_dims=1))
    assert packed.layout.matrix == flat.layout.matrix == (12, 30)
    assert all(map(torch.equal, packed.parts, flat.parts))
    assert torch.equal(packed.unpack().flatten(), flat.unpack().flatten())


def test_images_are_kept_as_they_are_and_cost_nothing() -> None:
    layer = nn.Conv2d(3, 6, 3)
    plain, razor = copy.deepcopy(layer), get_razor_model(nn.Sequential(layer))
    x = torch.randn(2, 3, 9, 9)
    assert measure_saved_bytes(razor, input=x).total == 0
    plain(x).square().sum().backward()
    razor(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_geometry_of_a_frozen_convolution_saves_no_input() -> None:
    layer = nn.Conv2d(4, 6, 3).requires_grad_(False)
    model = get_razor_model(nn.Sequential(nn.Conv2d(4, 4, 1), layer))
    rows = {row.name: row.razor_bytes for row in model.memory_report(input=torch.randn(2, 4, 9, 9)).modules}
    assert rows.get("1", 0) == 0


def test_autocast_packs_in_its_dtype() -> None:
    model = get_razor_model(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3)), RazorConfig.preset("lossless"))
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        report = model.memory_report(input=x)
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert report.razor_bytes <= report.dense_bytes


def test_convolution_returns_what_its_forward_does() -> None:
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    geometry = Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    y = convolution(x, weight, None, geometry, lambda x: F.conv2d(x, weight), LOSSLESS)
    assert torch.equal(y, F.conv2d(x, weight))


@pytest.mark.parametrize("stores", ["x_hat", "input"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 6, 5, 2), (2, 6, 7), (2, 6, 2, 3, 2)], ids=str)
def test_gradcheck_group_norm(shape: tuple[int, ...], affine: bool, stores: str) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scales = [torch.randn(6, dtype=torch.float64, requires_grad=True) if affine else None for _ in range(2)]
    spec = PackSpec(row_dims=len(shape) - 2)
    assert gradcheck(lambda x, w, b: group_norm(x, 3, w, b, 1e-5, spec, stores), (x, *scales))


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 8),
        nn.GroupNorm(8, 8, affine=False),
        nn.GroupNorm(1, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.InstanceNorm2d(8),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_norms_of_maps_are_bit_equal_and_near_in_gradients(norm: nn.Module, memory_format) -> None:
    torch.manual_seed(0)
    plain = Alone(copy.deepcopy(norm))
    razor = get_razor_model(copy.deepcopy(plain))
    x = (torch.randn(3, 8, 13, 11) * 3 + 1).contiguous(memory_format=memory_format)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = razor(found), plain(expected)
    assert torch.equal(y, z)
    grad = torch.randn_like(z)
    y.backward(grad)
    z.backward(grad)
    assert F.cosine_similarity(found.grad.flatten(), expected.grad.flatten(), dim=0) > 0.98
    for parameter, dense in zip(razor.parameters(), plain.parameters(), strict=True):
        assert F.cosine_similarity(parameter.grad, dense.grad, dim=0) > 0.9
    saved = measure_saved_bytes(razor, x=x.clone().requires_grad_()).total
    assert saved < 0.25 * x.nbytes


def test_a_convolution_behind_a_group_norm_reads_its_x_hat() -> None:
    model = get_razor_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3)))
    rows = {row.name: row.razor_bytes for row in model.memory_report(input=torch.randn(2, 3, 24, 24)).modules}
    assert rows["1"] > 0
    assert rows.get("2", 0) < 256  # gamma and beta


def test_instance_norm_with_running_statistics_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.warns(UserWarning, match="InstanceNorm2d has running statistics, or a forward of its own: 1"):
        get_razor_model(model)


@pytest.mark.parametrize(
    "module",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.AvgPool2d((2, 5), stride=(1, 2), ceil_mode=True, divisor_override=3),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((3, None)),
        nn.AdaptiveAvgPool2d(7),
    ],
    ids=str,
)
def test_average_pooling_is_exact_and_saves_nothing(module: nn.Module) -> None:
    plain = Alone(module)
    razor = get_razor_model(copy.deepcopy(plain))
    x = torch.randn(2, 3, 19, 17)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = razor(found), plain(expected)
    assert torch.equal(y, z)
    grad = torch.randn_like(z)
    y.backward(grad)
    z.backward(grad)
    assert torch.equal(found.grad, expected.grad)
    assert measure_saved_bytes(razor, x=x.clone().requires_grad_()).total == 0


ELEMENTWISE: dict[str, tuple[ActivationRule, nn.Module]] = {
    "relu": (RELU, nn.ReLU(inplace=True)),
    "relu6": (RELU6, nn.ReLU6(inplace=True)),
    "leaky_relu": (leaky_relu(0.2), nn.LeakyReLU(0.2, inplace=True)),
    "hardsigmoid": (HARDSIGMOID, nn.Hardsigmoid(inplace=True)),
    "silu": (SILU, nn.SiLU(inplace=True)),
    "dropout": (RELU, nn.Dropout(0.3, inplace=True)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_in_place_keep_their_contract(name: str) -> None:
    """The input is changed; and the gradient is that of the same function out of place."""
    module = ELEMENTWISE[name][1]
    plain, razor = Alone(module), get_razor_model(Alone(copy.deepcopy(module)), RazorConfig(activation_bits=32))
    x = torch.randn(3, 4, 9, 8) * 3
    results = []
    for model in (razor, plain):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        middle = leaf * 1.0
        y = model.layer(middle)
        assert y is middle
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_in_place_functions_leave_views_to_torch() -> None:
    model = get_razor_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5, inplace=True)))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad is not None


def test_a_block_with_a_relu_in_place_stores_each_tensor_once() -> None:
    def block(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=inplace), nn.Conv2d(16, 16, 3, padding=1)
        return get_razor_model(nn.Sequential(*layers))

    x = torch.randn(4, 3, 32, 32)
    saved = [block(inplace).memory_report(input=x).razor_bytes for inplace in (False, True)]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("rule", [RELU, RELU6, HARDSIGMOID, leaky_relu(0.1)], ids=["relu", "relu6", "hard", "leaky"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_derivatives_of_two_values_take_a_bit_and_are_exact(rule: ActivationRule, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 7, 3) * 4).to(dtype).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = activation(x, rule.value, rule, 4)
    assert sum(t.nbytes for t in saved) == -(-x.numel() // 8)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(rule.value(x), x, grad)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=0)


@pytest.mark.parametrize("shape", [(3, 4, 1, 1), (1, 4, 1, 1), (4, 1, 1), (3, 1, 1, 1)], ids=str)
def test_gates_of_channels(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, gate: scaling(x, gate, LOSSLESS), (x, gate))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return x * self.gate(self.pool(x))


def test_squeeze_and_excitation_saves_the_map_once() -> None:
    model = get_razor_model(nn.Sequential(nn.Conv2d(3, 3, 1), SqueezeExcite()))
    report = model.memory_report(input=torch.randn(4, 3, 34, 34))
    rows = {row.name: row for row in report.modules}
    assert rows["1"].dense_bytes > 4 * 8 * 32 * 32 * 3
    assert rows["1"].razor_bytes < 0.1 * rows["1"].dense_bytes


@pytest.mark.parametrize("padding", [(1, 2), (1, 0, 2, 3), (-1, 1, 0, -2)], ids=str)
def test_padded_maps_are_restored_from_what_was_saved_before(padding: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    y = batch_norm(x, None, None, None, None, True, 0.1, 1e-5, LOSSLESS)
    z = zero_pad(activation(y, F.relu, RELU, 4), padding)
    assert torch.equal(z, F.pad(F.relu(y), padding))
    origin = origin_of(z)
    assert origin.layout.shape == z.shape
    torch.testing.assert_close(origin.unpack(), z.detach(), rtol=1e-4, atol=1e-5)
    rows = origin.layout.unpack_rows(origin.parts, 3, 6, torch.float32)
    torch.testing.assert_close(rows, origin.unpack().flatten(0, 1).flatten(1)[3:6])


def test_a_padding_module_lets_the_next_convolution_read_what_was_before_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, groups=8))
    rows = {row.name: row for row in get_razor_model(model).memory_report(input=torch.randn(2, 3, 32, 32)).modules}
    assert rows["3"].razor_bytes < 0.4 / 8 * 2 * 8 * 34 * 34 + 64  # 1 % exact, the rest from SiLU's cells


@pytest.mark.parametrize("width", [8, 7])
def test_an_activations_cells_serve_convolutions_and_linear_layers(width: int) -> None:
    """Also where rows have other lengths: maps go by planes, tokens by channels."""
    spec = PackSpec(0.99, bits=2, row_dims=2)
    x = torch.randn(2, 6, 8, width, requires_grad=True)
    y = activation(x * 1.0, F.silu, SILU, 4)
    maps = origin_of(y).layout
    assert maps.matrix == (12, 8 * width)
    by_width = maps.regrouped(origin_of(y).parts, (12 * 8, width))
    assert (by_width is None) == (width % 2 == 1)  # rows of half a byte too much
    if by_width is not None:
        assert torch.equal(by_width.unpack(), origin_of(y).unpack())
    restored = origin_of(y).unpack()
    assert (restored - y).square().mean() < 0.05 * y.square().mean()
    packed = pack_shared(y, spec)
    assert packed.layout.matrix == (12, 8 * width)
    first = packed.layout.unpack_rows(packed.parts, 0, 1, torch.float32)
    assert torch.equal(packed.unpack().flatten(0, 1).flatten(1)[:1], first)


def test_dropped_maps_are_restored_for_a_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    y = batch_norm(x, None, None, None, None, True, 0.1, 1e-5, CODED)
    z = dropout(activation(y, F.relu, RELU, 4), 0.5)
    restored = origin_of(z).unpack()
    assert torch.equal(restored[z == 0], torch.zeros_like(restored[z == 0]))
    assert (restored - z).square().mean() < 0.1 * z.square().mean()


class NormAct(nn.BatchNorm2d):
    """A batch norm that calls its function itself, or its base class, and then an activation function."""

    def __init__(self, channels: int, inherits: bool) -> None:
        super().__init__(channels)
        self.inherits, self.act = inherits, nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        if self.inherits:
            return self.act(super().forward(input))
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        return self.act(F.batch_norm(input, *statistics, self.weight, self.bias, self.training, 0.1, self.eps))


@pytest.mark.parametrize("inherits", [False, True])
def test_a_batch_norm_in_code_of_its_own_is_packed(inherits: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 1), NormAct(16, inherits), nn.Conv2d(16, 4, 1))
    x = torch.randn(4, 3, 24, 24)
    lossless, packed = (
        get_razor_model(copy.deepcopy(plain), RazorConfig.preset(preset)) for preset in ("lossless", "balanced")
    )
    rows = {row.name: row for row in packed.memory_report(input=x).modules}
    assert rows["1"].razor_bytes < 3.5 / 32 * rows["1"].dense_bytes
    assert not packed[1].razor_decision.again
    outputs = [model(x) for model in (plain, lossless, packed)]
    for output in outputs:
        assert torch.equal(output, outputs[0])
        output.square().sum().backward()
    for model in (lossless, packed):
        assert all(map(torch.equal, model.buffers(), plain.buffers()))
    for found, expected in zip(lossless.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)
    for model in (plain, packed):
        model.eval()
    assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize("inherits", [False, True])
def test_a_batch_norm_in_code_of_its_own_refuses_one_value_a_channel(inherits: bool) -> None:
    model = get_razor_model(nn.Sequential(nn.Conv2d(3, 16, 1), NormAct(16, inherits)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 1, 1))
    assert not model[1].running_mean.any()


def test_a_convolution_that_pads_in_another_way_is_packed_behind_its_padding() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    x = torch.randn(2, 3, 9, 9)
    for model in (plain, razor):
        model(x).square().sum().backward()
    assert torch.equal(razor(x), plain(x))
    for found, expected in zip(razor.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    packed = get_razor_model(copy.deepcopy(plain))
    rows = {row.name: row for row in packed.memory_report(input=x).modules}
    # Reflecting keeps its input, whatever comes behind it.
    assert rows["1"].razor_bytes - 2 * 4 * 9 * 9 * 4 < 0.1 * rows["1"].dense_bytes


def test_what_is_excluded_inside_of_a_module_with_own_calls_stays_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), SqueezeExcite())
    get_razor_model(model, RazorConfig(exclude_modules=["act"]))
    rows = {row.name: row for row in model.memory_report(input=torch.randn(2, 3, 18, 18)).modules}
    assert rows["1.act"].razor_bytes == rows["1.act"].dense_bytes > 0


def test_frozen_batch_norms_stay_so_and_save_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 3, 16, 16)
    model(x)  # statistics other than those it began with
    assert freeze_batch_norms(model) is model
    keys, buffers = list(model.state_dict()), copy.deepcopy(list(model.buffers()))
    plain = copy.deepcopy(model)
    razor = pickle.loads(pickle.dumps(get_razor_model(model, RazorConfig.preset("lossless"))))
    for other in (plain, razor):
        other.train()  # as Trainer does before each step
        other(x).square().sum().backward()
        assert not other[1].training
        assert other[1].weight.grad is None
        assert all(map(torch.equal, other.buffers(), buffers))
        assert list(other.state_dict()) == keys
    for found, expected in zip(razor.parameters(), plain.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad)
    rows = {row.name: row for row in model.train().memory_report(input=x).modules}
    assert rows["1"].razor_bytes < 256
    assert "RazorFrozenBatchNorm2d" in repr(model)
    model.remove_razor().train()
    assert type(model[1]).__name__ == "FrozenBatchNorm2d"
    assert not model[1].training
    with pytest.raises(ValueError, match="nothing to freeze in this Linear: it has no batch norm"):
        freeze_batch_norms(nn.Linear(2, 2))
