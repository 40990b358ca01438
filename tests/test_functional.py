"""Each operator on its own: the dense forward to the bit; autograd's gradients where storage is lossless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from hf_backrazor.functional import (
    activation,
    dropout,
    layer_norm,
    linear,
    product,
    recomputed_attention,
    rms_norm,
    sparse_attention,
)
from hf_backrazor.functional.activation import (
    DEVIATIONS,
    GELU,
    GELU_TANH,
    HARDSWISH,
    MISH,
    QUICK_GELU,
    RELU,
    RELU6,
    SIGMOID,
    SILU,
    TANH,
    ActivationRule,
    cell_tables,
    leaky_relu,
)
from hf_backrazor.functional.sharing import note_cast, origin_of, pack_shared
from hf_backrazor.packing import PackSpec, decode_cells, encode_cells
from hf_backrazor.packing.layout import SLICE_NUMEL, UNPACK_NUMEL

LOSSLESS = PackSpec()
PAPER = PackSpec(0.9, "sample", value_dtype="float32")
CODED = PackSpec(0.9, "row", bits=2)
SPECS = pytest.mark.parametrize("spec", [LOSSLESS, PAPER, CODED], ids=["lossless", "paper", "coded"])
SHAPES = [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_who_saves_an_activation_saves_its_values_alone(tmp_path: Path) -> None:
    y = layer_norm(torch.randn(8, 64, requires_grad=True), (64,), None, None, 1e-5, CODED)
    pack_shared(y, CODED)
    torch.save(y, tmp_path / "razor.pt")
    torch.save(y.detach().requires_grad_(), tmp_path / "plain.pt")
    assert abs((tmp_path / "razor.pt").stat().st_size - (tmp_path / "plain.pt").stat().st_size) < 200
    loaded = torch.load(tmp_path / "razor.pt")
    assert torch.equal(loaded, y)
    assert origin_of(loaded) is None


def test_casts_of_a_tensor_share_its_copy_while_it_is_what_it_was() -> None:
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True) * 2
    casts = [x.float() for _ in range(2)]
    narrow = x.float().half()
    for cast in (*casts, narrow):
        note_cast(cast, x)
    shared = pack_shared(x, CODED)
    assert all(pack_shared(cast, CODED) is shared for cast in casts)
    wide, own = (shared.layout.unpack(shared.parts, dtype) for dtype in (torch.float32, None))
    assert torch.equal(wide.bfloat16(), own)
    # float16 does not hold all values of bfloat16; and what is stored as it is, is stored in its own dtype.
    assert pack_shared(narrow, CODED) is not shared
    assert pack_shared(casts[0], LOSSLESS).parts[0].dtype == torch.float32
    with torch.no_grad():
        x.mul_(-1)
    after = pack_shared(casts[0], CODED)
    assert after is not shared
    assert torch.nn.functional.cosine_similarity(after.layout.unpack(after.parts), casts[0], dim=-1).min() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_gradcheck_linear(shape: tuple[int, ...], transposed: bool) -> None:
    if transposed and len(shape) == 1:
        pytest.skip("Conv1D takes no vectors")
    weight = double(5, 7) if transposed else double(7, 5)
    assert gradcheck(lambda x, w, b: linear(x, w, b, LOSSLESS, transposed), (double(*shape), weight, double(7)))


@pytest.mark.parametrize("wanted", range(1, 8))
def test_gradcheck_linear_for_any_subset_of_gradients(wanted: int) -> None:
    x, weight, bias = double(3, 5), double(7, 5), double(7)
    for i, tensor in enumerate((x, weight, bias)):
        tensor.requires_grad_(bool(wanted & 1 << i))
    assert gradcheck(lambda x, w, b: linear(x, w, b, LOSSLESS), (x, weight, bias))


@pytest.mark.parametrize("stores", ["x_hat", "input"])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=str)
def test_gradcheck_layer_norm(shape: tuple[int, ...], affine: str, stores: str) -> None:
    weight = None if affine == "none" else double(5)
    bias = double(5) if affine == "both" else None
    assert gradcheck(lambda x, w, b: layer_norm(x, (5,), w, b, 1e-5, LOSSLESS, stores), (double(*shape), weight, bias))


def test_gradcheck_layer_norm_over_two_dimensions() -> None:
    assert gradcheck(
        lambda x, w, b: layer_norm(x, (3, 5), w, b, 1e-5, LOSSLESS), (double(2, 3, 5), double(3, 5), double(3, 5))
    )


@pytest.mark.parametrize("stores", ["x_hat", "input"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck_rms_norm(offset: float, stores: str) -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        def plain(x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight + offset)

        return rms_norm(x, weight, 1e-5, LOSSLESS, stores, offset, plain)

    assert gradcheck(forward, (double(2, 3, 5), double(5)))


RULES = {
    "gelu": (F.gelu, GELU),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), GELU_TANH),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), QUICK_GELU),
    "silu": (F.silu, SILU),
    "mish": (F.mish, MISH),
    "hardswish": (F.hardswish, HARDSWISH),
    "tanh": (torch.tanh, TANH),
    "sigmoid": (torch.sigmoid, SIGMOID),
    "relu": (F.relu, RELU),
    "relu6": (F.relu6, RELU6),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), leaky_relu(0.1)),
}
ACTIVATIONS = pytest.mark.parametrize(("function", "rule"), RULES.values(), ids=RULES)


@ACTIVATIONS
def test_gradcheck_activation(function, rule: ActivationRule) -> None:
    for with_rule in (rule, None):
        assert gradcheck(lambda x, r=with_rule: activation(x, function, r, 32), (double(4, 6),))


@ACTIVATIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cells_of_an_activation_function(function, rule: ActivationRule, bits: int) -> None:
    if rule.steps is not None:
        pytest.skip("takes one bit, without cells")
    cells, derivatives, values = cell_tables(rule, bits)
    starts = cells.starts.int()
    assert starts[:, 0].eq(0).all()
    assert starts.diff().gt(0).all()
    assert starts.shape == derivatives.values.shape == values.values.shape == (len(DEVIATIONS), 2**bits)
    # In the mean over inputs like those of pretrained models, a bit more divides the error by nearly four.
    x = torch.randn(4096, dtype=torch.float64) * 1.25 - 0.5
    x.requires_grad_()
    value = function(x)
    (derivative,) = torch.autograd.grad(value.sum(), x)
    number = encode_cells(x.detach().view(1, -1), cells)
    # A gradient is multiplied by the derivative, so its error counts in relation to the derivative itself; the mean of
    # the values is a bias's business.
    for table, exact, measure in (
        (derivatives, derivative, derivative.square().mean()),
        (values, value.detach(), value.detach().var()),
    ):
        error = (decode_cells(number, 4096, cells, table, torch.float64)[0] - exact).square().mean() / measure
        assert error < {2: 0.2, 3: 0.06, 4: 0.02, 8: 2e-3}[bits]


@ACTIVATIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_activation_error_and_bytes(function, rule: ActivationRule, bits: int) -> None:
    x = torch.randn(64, 96, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = activation(x, function, rule, bits)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    if rule.steps is not None:
        assert sum(t.nbytes for t in saved) == x.numel() / 8
        assert torch.equal(grad, expected)
    else:
        members = 64 if bits <= 8 else 0  # a byte a row says at which scale its cells are
        assert sum(t.nbytes for t in saved) == x.numel() * bits / 8 + members
        assert (grad - expected).square().mean().sqrt() <= {2: 0.25, 3: 0.12, 4: 0.07, 8: 0.03, 16: 1e-3}[bits]


SCALES = [1e-4, 1e-3, 0.01, 0.03, 0.1, 1.0, 10.0, 100.0]


def gradients(x: Tensor, weight: Tensor, grad: Tensor, function, then) -> tuple[Tensor, Tensor]:
    """Of the input of an activation function, and of the weight of the linear layer that follows."""
    leaf, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(then(function(leaf * 1.0), weight), (leaf, weight), grad)


def cosine(found: Tensor, expected: Tensor) -> float:
    return F.cosine_similarity(found.double().flatten(), expected.double().flatten(), 0).item()


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_inputs_of_any_scale(function, rule: ActivationRule, dtype: torch.dtype) -> None:
    """Each scale by itself, and rows of all of them in one tensor."""
    if rule.steps is not None:
        pytest.skip("takes one bit, without cells")
    torch.manual_seed(0)
    noise, grad, weight = torch.randn(len(SCALES), 64, 512), torch.randn(64, 96), torch.randn(96, 512)
    x = (noise * torch.tensor(SCALES)[:, None, None]).to(dtype)
    every = grad.repeat(len(SCALES), 1) / torch.tensor(SCALES).repeat_interleave(64).unsqueeze(1)
    coded = PackSpec(1.0, bits=4)  # nothing is kept exactly

    def both(x: Tensor, grad: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        found = gradients(
            x,
            weight.to(dtype),
            grad.to(dtype),
            lambda x: activation(x, function, rule, 4),
            lambda y, weight: linear(y, weight, None, coded),
        )
        # Of the same numbers in float32: at great scales, the dense gradient in bfloat16 is a rounding error.
        expected = gradients(x.float(), weight.to(dtype).float(), grad.to(dtype).float(), function, F.linear)
        return found, expected

    for rows, scale in zip(x, SCALES, strict=True):
        found, expected = both(rows, grad)
        assert min(map(cosine, found, expected)) > 0.985, scale
    found, expected = both(x.flatten(0, 1), every)
    assert cosine(found[1], expected[1]) > 0.985
    for of_scale in zip(found[0].split(64), expected[0].split(64), SCALES, strict=True):
        assert cosine(*of_scale[:2]) > 0.985, of_scale[2]


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x = torch.randn(5, 300)
    x[1], x[2, 7], x[3, 7] = 0, torch.inf, torch.nan
    dense, coded = (x.clone().requires_grad_() for _ in range(2))
    F.gelu(dense).sum().backward()
    activation(coded, F.gelu, GELU, 4).sum().backward()
    assert coded.grad.isfinite().all()
    assert (coded.grad[[0, 1, 4]] - dense.grad[[0, 1, 4]]).abs().max() < 0.15


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), ()], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_activation_of_hardly_anything(shape: tuple[int, ...], bits: int) -> None:
    x = torch.full(shape, 0.7, requires_grad=True)
    y = activation(x * 1.0, F.gelu, GELU, bits)
    assert torch.equal(y, F.gelu(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == shape
    assert pack_shared(y, PackSpec(0.99, bits=2)).unpack().shape == shape


def test_cells_of_rows_that_are_cut_or_joined() -> None:
    """Pieces of a row are coded at its scale. Rows that become one have several: they are packed anew."""
    x = (torch.randn(3, 4, 6, 8) * torch.logspace(-3, 2, 12).view(3, 4, 1, 1)).requires_grad_()
    origin = origin_of(activation(x * 1.0, F.gelu, GELU, 4))
    assert origin.layout.matrix == (12, 48)
    pieces = origin.layout.regrouped(origin.parts, (72, 8))
    assert pieces.layout.matrix == (72, 8)
    assert torch.equal(pieces.unpack(), origin.unpack())
    assert torch.equal(pieces.layout.unpack_rows(pieces.parts, 7, 9, x.dtype), origin.unpack().view(72, 8)[7:9])
    assert origin.layout.regrouped(origin.parts, (6, 96)) is None
    assert origin.layout.regrouped(origin.parts, (18, 32)) is None


def test_activation_with_a_learnable_parameter() -> None:
    slope = double(1)
    assert gradcheck(lambda x, s: activation(x, F.prelu, None, 32, parameters=(s,)), (double(4, 6), slope))


def test_relu_lets_the_same_gradients_through_as_autograd() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, float("nan"), float("inf"), -float("inf")], requires_grad=True)
    (expected,) = torch.autograd.grad(F.relu(x).sum(), x)
    (grad,) = torch.autograd.grad(activation(x, F.relu, RELU, 4).sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("p", [0.1, 0.15, 0.42, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 33)], ids=str)
def test_dropout_is_the_dense_one_for_the_same_generator(shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    results = []
    for function in (lambda x: F.dropout(x, p), lambda x: dropout(x, p)):
        torch.manual_seed(3)
        x = torch.ones(shape, dtype=dtype, requires_grad=True)
        y = function(x)
        (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
        results.append((y, grad, torch.get_rng_state()))
    (y, grad, state), (y_razor, grad_razor, state_razor) = results
    assert torch.equal(y, y_razor)
    assert torch.equal(state, state_razor)
    torch.testing.assert_close(grad_razor, grad)


@pytest.mark.parametrize("spec", [LOSSLESS, PAPER], ids=["lossless", "paper"])
def test_inputs_need_not_be_contiguous(spec: PackSpec) -> None:
    x = torch.randn(33, 4, 9).permute(1, 2, 0).requires_grad_()
    copied = x.detach().contiguous().requires_grad_()
    weight, gamma, beta = torch.randn(17, 33), torch.randn(33), torch.randn(33)
    for function in (
        lambda x: dropout(x, 0.4),
        lambda x: linear(x, weight.requires_grad_(), None, spec),
        lambda x: layer_norm(x, (33,), gamma, beta, 1e-5, spec),
        lambda x: rms_norm(x, gamma, 1e-5, spec),
        lambda x: activation(x, F.gelu, GELU, 4),
        lambda x: activation(x, F.relu, RELU, 4),
        lambda x: activation(x, F.gelu, GELU, 16),
    ):
        grads = []
        for tensor in (x, copied):
            torch.manual_seed(1)
            y = function(tensor)
            grads.append(torch.autograd.grad(y.square().sum(), tensor)[0])
        if function.__code__.co_names[0] != "dropout":  # draws in the order of memory, as the dense operator does
            torch.testing.assert_close(*grads)
    torch.manual_seed(1)
    expected = F.dropout(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.4), expected)
    mask = torch.autograd.grad(expected.sum(), x)[0]
    torch.manual_seed(1)
    assert torch.equal(torch.autograd.grad(dropout(x, 0.4).sum(), x)[0], mask)


def test_gradcheck_dropout() -> None:
    def function(x: Tensor) -> Tensor:
        torch.manual_seed(2)  # the same mask in every evaluation
        return dropout(x, 0.3)

    assert gradcheck(function, (double(3, 5),))


def test_dropout_saves_one_bit_an_element() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(torch.randn(8, 64, requires_grad=True), 0.1)
    assert sum(t.nbytes for t in saved) == 8 * 64 / 8


def attention_case(heads: int, kv_heads: int, mask: str) -> tuple[tuple[Tensor, ...], dict]:
    q, k, v = double(1, heads, 4, 2), double(1, kv_heads, 4, 2), double(1, kv_heads, 4, 2)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(1, 1, 4, 4) < 0.7
        attn_mask[..., 0] = True
    elif mask == "float":
        attn_mask = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    return (q, k, v), {"attn_mask": attn_mask, "is_causal": mask == "causal", "enable_gqa": heads != kv_heads}


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", ["recompute", "sparse"])
def test_gradcheck_attention(form: str, p: float, heads: int, kv_heads: int, mask: str) -> None:
    inputs, options = attention_case(heads, kv_heads, mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=0.5, **options).transpose(1, 2)

    def razor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same dropout in every evaluation
        if form == "recompute":
            return recomputed_attention(attend, q, k, v, (), LOSSLESS, random=p > 0)
        return sparse_attention(attend, q, k, v, options["attn_mask"], 0.5, options["is_causal"], p, LOSSLESS)

    assert gradcheck(razor, inputs)
    torch.manual_seed(5)
    assert torch.equal(razor(*inputs), (torch.manual_seed(5), attend(*inputs))[1])


def test_recomputed_attention_gives_gradients_to_the_other_tensors() -> None:
    q, k, v, bias = double(1, 2, 4, 3), double(1, 2, 4, 3), double(1, 2, 4, 3), double(1, 2, 4, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    assert gradcheck(lambda q, k, v, b: recomputed_attention(attend, q, k, v, (b,), LOSSLESS, False), (q, k, v, bias))


def test_recomputed_attention_gives_gradients_to_parameters() -> None:
    q, k, v, scale, unused = double(1, 2, 4, 3), double(1, 2, 4, 3), double(1, 2, 4, 3), double(1), double(2)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, unused: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * scale, k, v, attn_mask=bias)

    bias = double(1, 1, 4, 4)
    assert gradcheck(
        lambda q, k, v, *others: recomputed_attention(attend, q, k, v, others, LOSSLESS, False),
        (q, k, v, scale, unused, bias),
    )


def test_recomputation_leaves_the_generator_where_it_was() -> None:
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)  # noqa: E731
    y = recomputed_attention(attend, q, k, v, (), LOSSLESS, True)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@SPECS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_dense_one(spec: PackSpec, dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 33).to(dtype).requires_grad_()
    w, b, gamma, beta = (torch.randn(*s).to(dtype).requires_grad_() for s in ((17, 33), (17,), (33,), (33,)))
    assert torch.equal(linear(x, w, b, spec), F.linear(x, w, b))
    for stores in ("x_hat", "input"):
        assert torch.equal(layer_norm(x, (33,), gamma, beta, 1e-5, spec, stores), F.layer_norm(x, (33,), gamma, beta))
        assert torch.equal(rms_norm(x, gamma, 1e-5, spec, stores), F.rms_norm(x, (33,), gamma, 1e-5))


@SPECS
def test_exact_gradients_stay_exact(spec: PackSpec) -> None:
    x, w, b = torch.randn(4, 9, 33, requires_grad=True), torch.randn(17, 33, requires_grad=True), torch.randn(17)
    b.requires_grad_()
    upstream = torch.randn(4, 9, 17)
    expected = torch.autograd.grad(F.linear(x, w, b), (x, b), upstream)
    torch.testing.assert_close(torch.autograd.grad(linear(x, w, b, spec), (x, b), upstream), expected)
    gamma, beta = torch.randn(33, requires_grad=True), torch.randn(33, requires_grad=True)
    upstream = torch.randn(4, 9, 33)
    (expected,) = torch.autograd.grad(F.layer_norm(x, (33,), gamma, beta), beta, upstream)
    (grad,) = torch.autograd.grad(layer_norm(x, (33,), gamma, beta, 1e-5, spec), beta, upstream)
    torch.testing.assert_close(grad, expected)


def test_consumers_of_a_tensor_share_its_packed_copy() -> None:
    x = torch.randn(4, 9, 32, requires_grad=True) * 1
    storages = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        weights = [torch.randn(8, 32, requires_grad=True) for _ in range(3)]
        outputs = [linear(x, w, None, PAPER) for w in weights]
    weight_storages = {w.untyped_storage().data_ptr() for w in weights}
    assert len(storages - weight_storages) == 2  # values and mask
    del outputs


def saved_by(function) -> tuple[Tensor, int]:
    """The result of `function()`, and how many bytes it saves for backward, each storage once."""
    storages: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        return function(), sum(storages.values())


EXACT = PackSpec(0.0, bits=4)  # all kept: the codes beside them change nothing
NORMS = {
    "layer_norm": lambda x, gamma, beta: layer_norm(x, (32,), gamma, beta, 1e-5, EXACT),
    "no beta": lambda x, gamma, beta: layer_norm(x, (32,), gamma, None, 1e-5, EXACT),
    "no affine": lambda x, gamma, beta: layer_norm(x, (32,), None, None, 1e-5, EXACT),
    "rms_norm": lambda x, gamma, beta: rms_norm(x, gamma, 1e-5, EXACT),
    "gemma": lambda x, gamma, beta: rms_norm(
        x, gamma, 1e-5, EXACT, offset=1.0, forward=lambda x: F.rms_norm(x, (32,), gamma + 1, 1e-5)
    ),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("p", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_linear_behind_a_norm_reads_its_x_hat(norm, p: float, transposed: bool, monkeypatch) -> None:
    for numel in (SLICE_NUMEL, UNPACK_NUMEL):
        monkeypatch.setitem(numel, "cpu", 8 * 32)
    torch.manual_seed(0)
    x, gamma, beta = double(3, 9, 32), double(32), double(32)
    weights = [double(32, 7) if transposed else double(7, 32) for _ in range(2)]
    bias = double(7)

    def run(norm_of, linear_of) -> Tensor:
        torch.manual_seed(1)
        y = norm_of(x * 1, gamma, beta)
        y = dropout(y, p) if p else y
        return sum(linear_of(y, w).square().sum() for w in weights)

    sharing, size = saved_by(lambda: run(norm, lambda y, w: linear(y, w, bias, CODED, transposed)))
    # The same, but every linear layer packs a copy of its own, exactly.
    apart, size_apart = saved_by(lambda: run(norm, lambda y, w: linear(y.clone(), w, bias, LOSSLESS, transposed)))
    inputs = (x, *weights, bias, *(t for t in (gamma, beta) if norm not in (NORMS["no affine"],)))
    for grad, expected in zip(
        torch.autograd.grad(sharing, inputs, allow_unused=True),
        torch.autograd.grad(apart, inputs, allow_unused=True),
        strict=True,
    ):
        assert (grad is None) == (expected is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected)
    assert size < size_apart - 0.8 * x.nbytes


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["", "dropout"])
def test_linear_behind_an_activation_reads_its_input(p: float) -> None:
    u, weight = torch.randn(64, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)

    def run(linear_of) -> Tensor:
        torch.manual_seed(1)
        y = activation(u * 1, F.gelu, GELU, 4)
        return linear_of(dropout(y, p) if p else y)

    coded, size = saved_by(lambda: run(lambda y: linear(y, weight, None, PackSpec(0.99, bits=2))))
    pruned, size_pruned = saved_by(lambda: run(lambda y: linear(y, weight, None, PackSpec(0.99))))
    upstream = torch.randn_like(coded)
    (expected,) = torch.autograd.grad(F.linear(run(lambda y: y).detach(), weight), weight, upstream)
    error = (torch.autograd.grad(coded, weight, upstream)[0] - expected).norm() / expected.norm()
    without = (torch.autograd.grad(pruned, weight, upstream)[0] - expected).norm() / expected.norm()
    assert error < 0.15 < 0.8 < without
    # The coded one saves the exact elements that the pruned one saves, and no codes of its own.
    assert size == size_pruned


def test_residual_bits_of_zero_take_nothing_from_another_operator() -> None:
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    y = layer_norm(x, (64,), None, None, 1e-5, CODED)
    (grad,) = torch.autograd.grad(linear(y, weight, None, PackSpec(0.9)).sum(), weight, retain_graph=True)
    (expected,) = torch.autograd.grad(linear(y.detach(), weight, None, PackSpec(0.9)).sum(), weight)
    assert torch.equal(grad, expected)


def test_an_output_changed_in_place_is_not_restored_from_its_origin() -> None:
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    y = layer_norm(x, (64,), None, None, 1e-5, EXACT)
    y.mul_(3)
    (grad,) = torch.autograd.grad(linear(y, weight, None, PackSpec(0.5, bits=4)).sum(), weight)
    torch.testing.assert_close(grad, y.detach().sum(0).expand(8, -1), rtol=0.1, atol=0.3)


def test_gradcheck_product() -> None:
    assert gradcheck(lambda x, y: product(x, y, LOSSLESS), (double(2, 3, 5), double(2, 3, 5)))
    x, y = double(2, 3, 5), double(2, 3, 5)
    assert gradcheck(lambda y: product(x.detach(), y, LOSSLESS), (y,))


def test_gated_product_is_restored_from_its_factors() -> None:
    gate, up = torch.randn(64, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True)
    weight = torch.randn(128, 256, requires_grad=True)
    spec = PackSpec(0.99, bits=4)

    def run() -> Tensor:
        return linear(product(activation(gate * 1, F.silu, SILU, 4), up * 1, spec), weight, None, spec)

    result, size = saved_by(run)
    # 4 bits for the gate, 4 for up, the few exact elements and scales, the weight; nothing for the product.
    assert size - weight.nbytes < gate.numel() * (4 + 4 + 3 * 0.35) / 8
    expected = F.linear(F.silu(gate) * up, weight)
    assert torch.equal(result, expected)
    upstream = torch.randn_like(result)
    for grad, exact in zip(
        torch.autograd.grad(result, (gate, up, weight), upstream),
        torch.autograd.grad(expected, (gate, up, weight), upstream),
        strict=True,
    ):
        assert F.cosine_similarity(grad.flatten(), exact.flatten(), dim=0) > 0.985


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_does_not_depend_on_the_slices(dtype: torch.dtype, monkeypatch) -> None:
    x, weight = torch.randn(96, 64).to(dtype), torch.randn(48, 64).to(dtype).requires_grad_()
    upstream = torch.randn(96, 48).to(dtype)
    (whole,) = torch.autograd.grad(linear(x, weight, None, LOSSLESS), weight, upstream)
    for numel in (SLICE_NUMEL, UNPACK_NUMEL):
        monkeypatch.setitem(numel, "cpu", 8 * 64)
    (sliced,) = torch.autograd.grad(linear(x, weight, None, LOSSLESS), weight, upstream)
    assert sliced.dtype == dtype
    # In sixteen bits the sum of each slice is rounded.
    torch.testing.assert_close(sliced, whole, **({} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.1}))


def test_a_changed_tensor_is_packed_anew() -> None:
    x, w = torch.randn(4, 32, requires_grad=True) * 1, torch.randn(8, 32, requires_grad=True)
    linear(x, w, None, LOSSLESS)
    linear(x, w, None, PAPER)
    x.mul_(-3)
    (grad,) = torch.autograd.grad(linear(x, w, None, PAPER).sum(), w)
    fresh = x.clone()
    (expected,) = torch.autograd.grad(linear(fresh, w, None, PAPER).sum(), w)
    assert torch.equal(grad, expected)


def test_an_input_rewritten_without_a_new_version_is_packed_anew() -> None:
    buffer = np.ones((2, 4), dtype=np.float32)
    x, w = torch.from_numpy(buffer), torch.randn(3, 4, requires_grad=True)
    linear(x, w, None, PAPER)
    buffer[:] = 5
    (grad,) = torch.autograd.grad(linear(x, w, None, LOSSLESS).sum(), w)
    (again,) = torch.autograd.grad(linear(x, w, None, LOSSLESS).sum(), w)
    assert torch.equal(grad, torch.full((3, 4), 10.0))
    assert torch.equal(again, grad)
