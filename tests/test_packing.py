"""Properties of pack and unpack over shapes, dtypes, sparsities and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_backrazor.packing import (
    CODE_BITS,
    Cells,
    CellTable,
    PackSpec,
    decode,
    decode_cells,
    decode_cells_as_integers,
    encode,
    encode_cells,
    index_coding,
    kept_count,
    pack,
    pack_bits,
    rotate,
    topk_mask,
    unpack_bits,
    unrotate,
)
from hf_backrazor.packing.layout import SLICE_NUMEL, UNPACK_NUMEL
from hf_backrazor.packing.rotation import SIGNS

ROTATED = PackSpec(0.99, "row", 3, rotated=True)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(FLOATS)
granularities = st.sampled_from(("row", "sample", "tensor"))
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)
sparsities = st.one_of(st.sampled_from((0.0, 0.5, 0.8, 0.9, 0.97, 0.99)), st.floats(0, 0.999))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random tensors; some contiguous, some not; some of few distinct values, so that magnitudes tie."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        x = torch.randint(-2, 3, shape, generator=generator).float()
    else:
        x = torch.randn(shape, generator=generator)
    if len(shape) > 1 and draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.to(draw(dtypes))


def sets_of(x: torch.Tensor, granularity: str) -> torch.Tensor:
    """`x` as a matrix whose rows are the sets that top-k runs over."""
    if granularity == "tensor" or x.dim() < 2:
        return x.reshape(1, -1)
    return x.reshape(x.shape[0] if granularity == "sample" else math.prod(x.shape[:-1]), -1) if x.numel() else x


@given(st.integers(0, 10**6), sparsities)
def test_kept_count_keeps_the_stated_fraction(n: int, sparsity: float) -> None:
    k = kept_count(n, sparsity)
    assert (n > 0) <= k <= n
    assert abs(k - n * (1 - sparsity)) <= 1


@pytest.mark.parametrize(
    ("n", "sparsity", "k"), [(768, 0.9, 77), (100, 0.57, 43), (10, 0.9, 1), (1, 0.99, 1), (8, 0, 8)]
)
def test_kept_count_known_values(n: int, sparsity: float, k: int) -> None:
    assert kept_count(n, sparsity) == k


@given(tensors(), st.data())
def test_topk_mask_is_numpys_stable_sort(x: torch.Tensor, data: st.DataObject) -> None:
    x = x.reshape(1, -1)
    k = data.draw(st.integers(0, x.shape[1]))
    mask = topk_mask(x, k)
    expected = np.argsort(-x.abs().double().numpy()[0], kind="stable")[:k]
    assert mask.sum() == k
    assert set(mask[0].nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, math.nan, math.inf])
def test_topk_mask_of_a_constant_is_its_first_k(dtype: torch.dtype, value: float) -> None:
    mask = topk_mask(torch.full((3, 11), value, dtype=dtype), 4)
    assert torch.equal(mask, torch.arange(11).expand(3, -1) < 4)


def test_topk_mask_takes_nan_before_infinity_before_numbers() -> None:
    x = torch.tensor([[1.0, math.inf, 3e38, math.nan, -math.inf]])
    assert topk_mask(x, 1).nonzero()[:, 1].tolist() == [3]
    assert topk_mask(x, 2).nonzero()[:, 1].tolist() == [1, 3]
    assert topk_mask(x, 4).nonzero()[:, 1].tolist() == [1, 2, 3, 4]


@given(tensors(), sparsities, granularities)
def test_paper_packing_keeps_exactly_k_and_zeroes_the_rest(x: torch.Tensor, sparsity: float, granularity: str) -> None:
    packed = pack(x, PackSpec(sparsity, granularity, value_dtype="float32"))
    unpacked = packed.unpack()
    assert (unpacked.shape, unpacked.dtype) == (x.shape, x.dtype)
    for dense, restored in zip(sets_of(x, granularity), sets_of(unpacked, granularity), strict=True):
        k = kept_count(dense.numel(), sparsity)
        kept = restored != 0
        assert kept.sum() == min(k, int((dense != 0).sum()))
        assert torch.equal(restored[kept].float(), dense[kept].float())
        if kept.any() and not kept.all():
            assert dense[~kept].abs().max() <= dense[kept].abs().min()


@given(tensors(), granularities)
def test_sparsity_zero_is_lossless_and_no_copy(x: torch.Tensor, granularity: str) -> None:
    packed = pack(x, PackSpec(0.0, granularity))
    assert torch.equal(packed.unpack(), x)
    assert packed.parts[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@settings(deadline=None)
@given(
    tensors(),
    sparsities,
    granularities,
    st.sampled_from((0, *CODE_BITS)),
    st.sampled_from(("auto", "float32", "bfloat16", "float16", "int8")),
)
def test_layout_is_known_from_shape_dtype_and_spec_alone(
    x: torch.Tensor, sparsity: float, granularity: str, bits: int, value_dtype: str
) -> None:
    spec = PackSpec(sparsity, granularity, bits, value_dtype)
    packed, other = pack(x, spec), pack(torch.randn(x.shape).to(x.dtype), spec)
    assert packed.layout == other.layout
    assert [(p.shape, p.dtype) for p in packed.parts] == [(p.shape, p.dtype) for p in other.parts]
    unpacked = packed.unpack(torch.float32)
    assert (unpacked.shape, unpacked.dtype) == (x.shape, torch.float32)
    assert unpacked.isfinite().all()


@given(tensors(), sparsities, st.sampled_from(CODE_BITS))
def test_residual_codes_never_do_worse_than_zero(x: torch.Tensor, sparsity: float, bits: int) -> None:
    x = x.float()
    without = pack(x, PackSpec(sparsity, "row", 0, "float32")).unpack()
    coded = pack(x, PackSpec(sparsity, "row", bits, "float32")).unpack()
    # One scale serves a row: the error summed over it shrinks, though that of one element may grow. Equal: nothing
    # is left over. Ten percent: rows of a few elements are far from the Gaussian that the levels are made for.
    residual, restored = x - without, coded - without
    assert (residual - restored).square().sum() <= residual.square().sum() * 1.1 + 1e-12


@given(tensors(), sparsities, st.sampled_from((1, 2, 3, 4)))
def test_what_is_decoded_of_rotated_rows_has_the_projection_one(x: torch.Tensor, sparsity: float, bits: int) -> None:
    if not x.numel():
        return
    x = sets_of(x, "row").double() * 0.37
    keep = topk_mask(x, kept_count(x.shape[1], sparsity))
    codes = encode(x, bits, keep, rotated=True)
    restored = decode(codes, bits, x.shape[1], torch.float64, rotated=True)
    residual = x.masked_fill(keep, 0)
    # Half a unit in the last of bfloat16's 8 places, twice for what double precision adds.
    expected = residual.square().sum(1)
    assert ((restored * residual).sum(1) - expected).abs().le(expected * 2**-8).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("levels", "rotated"), [("gaussian", False), ("even", False), ("gaussian", True)])
def test_rows_without_anything_decode_to_zero(bits: int, levels: str, rotated: bool) -> None:
    codes = encode(torch.zeros(3, 50), bits, levels=levels, rotated=rotated)
    assert codes.scale.eq(0).all()
    assert decode(codes, bits, 50, torch.float32, levels, rotated).eq(0).all()


@pytest.mark.parametrize("bits", CODE_BITS)
def test_coding_leaves_its_input_alone(bits: int) -> None:
    x = torch.randn(3, 50, dtype=torch.float64)
    before = x.clone()
    codes, wide = encode(x.float(), bits), encode(x, bits)
    assert torch.equal(x, before)
    assert torch.equal(codes.fields, wide.fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [*range(1, 302, 5), 64, 128, 256, 576, 768, 1024])
def test_rotation_is_orthonormal(n: int, dtype: torch.dtype) -> None:
    matrix = rotate(torch.eye(n, dtype=dtype))
    within = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=dtype), atol=within, rtol=0)
    torch.testing.assert_close(unrotate(torch.eye(n, dtype=dtype)), matrix.t(), atol=within, rtol=0)
    x = torch.randn(7, n, dtype=dtype)
    before = x.clone()
    torch.testing.assert_close(unrotate(rotate(x)), x, atol=5 * within, rtol=0)
    torch.testing.assert_close(rotate(unrotate(x)), x, atol=5 * within, rtol=0)
    assert torch.equal(x, before)


def test_rotation_is_in_blocks_of_descending_size() -> None:
    matrix = rotate(torch.eye(300))
    start = 0
    for size in (128, 128, 32, 8, 4):
        inside = slice(start, start + size)
        torch.testing.assert_close(matrix[inside, inside].abs(), torch.full((size, size), size**-0.5))
        assert (matrix[inside] != 0).sum() == size**2
        start += size
    assert start == 300
    # The form of the definition: signs, then the matrix that is built by doubling.
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 128:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.tensor([-1.0 if int(bit) else 1.0 for bit in reversed(f"{SIGNS:0128b}")])
    torch.testing.assert_close(matrix[:128, :128], (signs.unsqueeze(1) * hadamard) * 128**-0.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["columns", "skewed", "few"])
def test_rotation_helps_rows_with_structure(bits: int, kind: str) -> None:
    """Columns of different size, as in heads; values on one side, as after a GELU; few that are not zero."""
    x = torch.randn(200, 256)
    if kind == "columns":
        x = x * torch.randn(256).exp()
    elif kind == "skewed":
        x = F.gelu(2 * x)
    else:
        x = x * (torch.rand(200, 256) < 0.1)
    errors = []
    for rotated in (False, True):
        restored = pack(x, PackSpec(0.985, bits=bits, value_dtype="float32", rotated=rotated)).unpack()
        errors.append((restored - x).square().sum().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("n", [*range(1, 40), *range(41, 301, 7), 300])
def test_rotated_rows_of_any_width(n: int) -> None:
    x = torch.randn(6, n)
    x[0] = 0
    for sparsity in (0.0, 0.5, 0.985, 1.0):
        packed = pack(x, PackSpec(sparsity, bits=4, value_dtype="float32", rotated=True))
        restored = packed.unpack()
        keep = topk_mask(x, packed.layout.kept)
        assert torch.equal(restored[keep], x[keep])
        assert restored[0].eq(0).all()
        if n >= 32:
            residual = x.masked_fill(keep, 0)[1:].square().sum()
            # 0.0096 is what Gaussian rows have.
            assert (restored - x)[1:].square().sum() <= 0.03 * residual


@pytest.mark.parametrize("shape", [(2, 3, 9, 64), (2, 3, 9, 128), (5, 32), (32,), (), (0, 64)])
@pytest.mark.parametrize("centred", [True, False])
def test_rotates_rows_of_any_shape(shape: tuple[int, ...], centred: bool) -> None:
    x = torch.randn(shape) + 3
    for row_dims in (1, 2):
        spec = PackSpec(0.985, bits=4, rotated=True, centred=centred and row_dims == 1, row_dims=row_dims)
        packed = pack(x, spec)
        restored = packed.unpack()
        assert restored.shape == x.shape
        assert (restored - x).norm() <= 0.12 * x.norm()
        assert packed.layout.integers(packed.parts) is None


@pytest.mark.parametrize("change", [{"granularity": "sample"}, {"granularity": "tensor"}, {"bits": 0}, {"bits": 8}])
def test_rotation_is_refused_where_it_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"rotated=True.*{next(iter(change))}="):
        PackSpec(**{"sparsity": 0.9, "bits": 4, "rotated": True, **change})


def test_error_of_gaussian_codes_is_lloyd_and_maxs() -> None:
    """It is their least mean squared error D; with the projection 1, that rotated rows have, D / (1 - D)."""
    x = torch.randn(256, 4096)
    for bits, error in {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}.items():
        restored = decode(encode(x, bits), bits, 4096, torch.float32)
        assert (x - restored).square().mean().item() == pytest.approx(error, rel=0.02)
        restored = decode(encode(x, bits, rotated=True), bits, 4096, torch.float32, rotated=True)
        assert (x - restored).square().mean().item() == pytest.approx(error / (1 - error), rel=0.02)
        assert (x - (1 - error) * restored).square().mean().item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("granularity", ["row", "sample", "tensor"])
def test_paper_bytes(granularity: str) -> None:
    x = torch.randn(4, 16, 64)
    packed = pack(x, PackSpec(0.75, granularity, value_dtype="float32"))
    size = sum(part.nbytes for part in packed.parts)
    assert size == x.numel() / 8 + x.numel() / 4 * 4


def test_positions_of_large_sets_take_32_bits() -> None:
    x = torch.randn(1, 2**17)
    packed = pack(x, PackSpec(0.9999, "tensor", value_dtype="float32"))
    assert packed.parts[1].dtype == torch.int32
    assert torch.equal(packed.unpack() != 0, topk_mask(x, kept_count(x.numel(), 0.9999)))


def test_value_dtype_is_never_wider_than_the_tensor() -> None:
    x = torch.randn(4, 64)
    for dtype, wanted, stored in [
        (torch.float32, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "float16", torch.float16),
        (torch.bfloat16, "float32", torch.bfloat16),
        (torch.bfloat16, "float16", torch.bfloat16),
        (torch.float64, "float32", torch.float32),
        (torch.float32, "int8", torch.int8),
    ]:
        assert pack(x.to(dtype), PackSpec(0.9, value_dtype=wanted)).parts[0].dtype == stored


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("n", [40, 300])
def test_what_poisons_a_row_poisons_it_rotated(poison: float, bits: int, n: int) -> None:
    x = torch.randn(3, n)
    x[0, 17] = x[0, 31] = poison
    for sparsity in (1 - 1 / n, 1.0):
        unpacked = pack(x, PackSpec(sparsity, bits=bits, rotated=True)).unpack()
        assert unpacked[0].isfinite().sum() == 0
        assert unpacked[1:].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [0, 2, 8])
@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_what_poisons_a_dense_gradient_poisons_the_packed_one(poison: float, bits: int, value_dtype: str) -> None:
    x = torch.randn(2, 40)
    x[0, 17] = poison
    unpacked = pack(x, PackSpec(0.9, "row", bits, value_dtype)).unpack()
    assert not unpacked[0].isfinite().all()
    assert unpacked[1].isfinite().all()


@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**31))
def test_bits_round_trip(rows: int, n: int, seed: int) -> None:
    mask = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == (rows, -(-n // 8))
    assert torch.equal(packed, torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")))
    assert torch.equal(unpack_bits(packed, n), mask)


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from((1, 2, 3, 4, 8)), st.integers(0, 2**31))
def test_cells_hold_what_lies_between_their_bounds(rows: int, n: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = (torch.rand(3, 255, generator=generator).argsort(1)[:, : 2**bits - 1] + 1).sort(1).values
    starts = F.pad(starts, (1, 0))
    cells = Cells(bits, torch.tensor([1.0, 25.0]), torch.tensor([64.0, 32.0, 8.0]), starts.to(torch.uint8))
    x = torch.randn(rows, n, generator=generator) * torch.tensor([0.4, 1.0, 3.0, 9.0, 27.0])[:rows, None]
    codes = encode_cells(x, cells)
    member = codes.member.long()
    assert torch.equal(member, (x.square().mean(1) >= 1).long() + (x.square().mean(1) >= 25))
    table = CellTable(torch.arange(3 * 2.0**bits).view(3, -1))
    number = decode_cells(codes, n, cells, table, torch.float32) - 2**bits * member.unsqueeze(1)
    bounds = F.pad((starts - 128) / cells.density.unsqueeze(1), (0, 1), value=math.inf)
    bounds[:, 0] = -math.inf
    of_rows = bounds[member]
    assert (of_rows.gather(1, number.long()) <= x).all()
    assert (x < of_rows.gather(1, number.long() + 1)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_cells_as_integers_are_their_values(bits: int) -> None:
    """To half of a 127th of the greatest of each division, and a scale's rounding to bfloat16."""
    starts = torch.arange(2**bits).mul(256 // 2**bits).expand(2, -1).to(torch.uint8).contiguous()
    cells = Cells(bits, torch.tensor([1.0]), torch.tensor([64.0, 4.0]), starts)
    table = CellTable(torch.randn(2, 2**bits) * torch.tensor([[1e-3], [1e3]]))
    x = torch.randn(6, 50) * torch.tensor([0.1, 10.0]).repeat(3).unsqueeze(1)
    codes = encode_cells(x, cells)
    assert codes.member.tolist() == [0, 1] * 3
    integers = decode_cells_as_integers(codes, 50, cells, table, None)
    values = decode_cells(codes, 50, cells, table, torch.float32)
    greatest = table.values.abs().amax(1)[codes.member.long()].unsqueeze(1)
    assert ((integers.unit * integers.row_scale * integers.codes - values).abs() < greatest * 0.006).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**31))
def test_every_index_coding_round_trips(rows: int, n: int, sparsity: float, seed: int) -> None:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    unpacked = pack(x, PackSpec(sparsity, value_dtype="float32")).unpack()
    assert torch.equal(unpacked, x * topk_mask(x, kept_count(n, sparsity)))


@pytest.mark.parametrize(("rows", "n", "sparsity"), [(1, 20000, 0.97), (3, 20001, 0.97), (1, 2**17 + 1, 0.75)])
def test_offsets_of_many_kept_elements_round_trip(rows: int, n: int, sparsity: float) -> None:
    x = torch.randn(rows, n)
    packed = pack(x, PackSpec(sparsity, value_dtype="float32"))
    assert torch.equal(packed.unpack(), x * topk_mask(x, kept_count(n, sparsity)))


def test_index_coding_takes_the_fewest_bytes() -> None:
    assert [index_coding(n, k) for n, k in [(768, 768), (768, 0)]] == ["none", "none"]
    assert [index_coding(n, k) for n, k in [(768, 77), (768, 8), (3072, 31)]] == ["offsets"] * 3
    assert [index_coding(n, k) for n, k in [(768, 150), (64, 16)]] == ["mask"] * 2
    assert [index_coding(n, k) for n, k in [(3072, 1), (2**20, 10), (64, 1)]] == ["positions"] * 3
    # One byte for each of 31 kept in 3072, and for the ends of all blocks but one.
    index = pack(torch.randn(5, 3072), PackSpec(0.99)).parts[1]
    assert (index.shape, index.dtype) == ((5, 31 + 11), torch.uint8)


@pytest.mark.parametrize(("bits", "rotated"), [*((bits, False) for bits in (0, *CODE_BITS)), (2, True), (3, True)])
@pytest.mark.parametrize(("sparsity", "value_dtype"), [(0.99, "int8"), (0.9, "auto"), (1.0, "auto"), (0.0, "auto")])
def test_slices_of_rows_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, bits: int, rotated: bool, sparsity: float, value_dtype: str
) -> None:
    x = torch.randn(7, 9, 300)
    spec = PackSpec(sparsity, "row", bits, value_dtype, rotated=rotated)
    whole = pack(x, spec)
    expected = whole.unpack().view(63, 300)
    for numel in (SLICE_NUMEL, UNPACK_NUMEL):
        monkeypatch.setitem(numel, "cpu", 8 * 300)
    sliced = pack(x, spec)
    assert all(torch.equal(a, b) for a, b in zip(whole.parts, sliced.parts, strict=True))
    bounds = []
    for start, stop, dense in sliced.layout.slices(sliced.parts, torch.float32):
        bounds.append((start, stop))
        assert torch.equal(dense, expected[start:stop])
    assert bounds == [(start, min(start + 8, 63)) for start in range(0, 63, 8)]


@settings(deadline=None)
@given(
    tensors(),
    sparsities,
    granularities,
    st.sampled_from((0, *CODE_BITS)),
    st.sampled_from(("auto", "float16", "int8")),
    st.sampled_from((1, -1)),
)
def test_adds_what_it_unpacks(
    x: torch.Tensor, sparsity: float, granularity: str, bits: int, value_dtype: str, sign: int
) -> None:
    packed = pack(x, PackSpec(sparsity, granularity, bits, value_dtype))
    for dtype in (torch.float32, torch.float64):
        into = torch.randn(x.shape, dtype=dtype)
        expected = into + sign * packed.unpack(torch.float32)
        packed.layout.add_to(packed.parts, into, sign)
        assert torch.equal(into, expected)


@pytest.mark.parametrize("spec", [PackSpec(0.9, "sample"), PackSpec(0.99, "row", 2), PackSpec(1.0, "row", 4)])
def test_number_of_threads_does_not_matter(spec: PackSpec) -> None:
    x = torch.randn(8, 197, 96)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(pack(x, spec).parts)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        pack(torch.arange(4), PackSpec())


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="bits=5"):
        PackSpec(0.9, bits=5)


@pytest.mark.parametrize(
    "spec", [PackSpec(0.9, "sample"), PackSpec(0.99, "row", 2), PackSpec(0.99, "row", 3, "int8"), ROTATED]
)
def test_meta_tensors_show_the_size(spec: PackSpec) -> None:
    x = torch.randn(4, 16, 96)
    real, traced = pack(x, spec), pack(x.to("meta"), spec)
    assert [(p.shape, p.dtype) for p in traced.parts] == [(p.shape, p.dtype) for p in real.parts]
    assert traced.unpack().shape == x.shape
