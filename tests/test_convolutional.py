"""Operators on feature maps: the dense forward to the bit; autograd's gradients where storage is lossless."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from hf_backrazor.functional import activation, batch_norm, convolution, max_pool2d
from hf_backrazor.functional.activation import RELU, RELU6
from hf_backrazor.functional.convolution import Geometry
from hf_backrazor.functional.layouts import RectifiedLayout
from hf_backrazor.functional.pooling import Window
from hf_backrazor.functional.sharing import origin_of
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
