"""Losses of dense prediction: resized logits in bands, exact; and asked for whole."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from architectures import make
from torch import Tensor, nn
from torch.autograd import gradcheck

from hf_backrazor import RazorConfig, estimate_saved_bytes, get_razor_model, measure_saved_bytes
from hf_backrazor.functional import Resizing, interpolated_cross_entropy
from hf_backrazor.functional.interpolated_cross_entropy import MODES
from hf_backrazor.modules import RazorOutermost
from hf_backrazor.modules.resized_logits import LazyResizedLogits

CLASSES, IGNORED = 6, 255
bands = sys.modules["hf_backrazor.functional.interpolated_cross_entropy"]


def case(size: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, CLASSES, 5, 7, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, *size))
    labels[0, : size[0] // 3] = IGNORED
    return logits, labels


@pytest.mark.parametrize("band", [2**20, 3 * CLASSES * 23, 1], ids=["one band", "three rows", "a row"])
@pytest.mark.parametrize("size", [(17, 23), (5, 7), (40, 13), (3, 4)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_are_those_of_the_whole(
    mode: str, size: tuple[int, int], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bands.BAND_NUMEL, "cpu", band)
    logits, labels = case(size)
    weight = torch.rand(CLASSES, dtype=torch.float64)
    corners = [None] if mode.startswith("nearest") else [False, True]
    for align_corners in corners:
        for options in ({}, {"label_smoothing": 0.1}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.2}):
            for reduction in ("mean", "sum"):
                options = {**options, "ignore_index": IGNORED, "reduction": reduction}
                whole = F.interpolate(logits, size, mode=mode, align_corners=align_corners)
                expected = F.cross_entropy(whole, labels, **options)
                loss = interpolated_cross_entropy(logits, labels, Resizing(size, mode, align_corners), **options)
                torch.testing.assert_close(loss, expected)
                grads = [torch.autograd.grad(3 * value, logits)[0] for value in (loss, expected)]
                torch.testing.assert_close(*grads)


def test_gradcheck() -> None:
    logits, labels = case((11, 13))
    resizing = Resizing((11, 13), "bilinear", False)
    assert gradcheck(lambda x: interpolated_cross_entropy(x, labels, resizing, ignore_index=IGNORED), (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = case((20, 28), dtype)
    loss = interpolated_cross_entropy(logits, labels, Resizing((20, 28), "bilinear", False), ignore_index=IGNORED)
    whole = F.interpolate(logits.detach().float(), (20, 28), mode="bilinear", align_corners=False)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), F.cross_entropy(whole, labels, ignore_index=IGNORED))
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.dtype == dtype


def test_no_pixel_counts() -> None:
    """As the dense loss: NaN, as there is nothing to take a mean over."""
    logits, labels = case((9, 9))
    loss = interpolated_cross_entropy(logits, labels.fill_(IGNORED), Resizing((9, 9), "bilinear", False), None, IGNORED)
    assert loss.isnan()


def test_mistakes_in_labels_are_told() -> None:
    logits, labels = case((9, 9))
    resizing = Resizing((9, 9), "bilinear", False)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 9, 8\): expected \(2, 9, 9\)"):
        interpolated_cross_entropy(logits, labels[..., :8], resizing)
    labels[0, 0, 0] = CLASSES
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        interpolated_cross_entropy(logits, labels, resizing, ignore_index=IGNORED)


def test_saves_the_gradient_of_the_small_logits_alone() -> None:
    logits, labels = case((40, 56), torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        interpolated_cross_entropy(logits, labels, Resizing((40, 56), "bilinear", False), ignore_index=IGNORED)
    large = [t for t in saved if t.numel() > 1]
    assert [t.shape for t in large] == [logits.shape]


# DPT's head gives logits of the labels' size, so that there is nothing to gain.
@pytest.mark.parametrize("name", ["segformer", "upernet", "beit", "mobilenet_v2_segmentation", "data2vec"])
def test_models_take_the_loss_in_bands(name: str) -> None:
    model, batch = make(name)
    dense = measure_saved_bytes(model, **batch)
    torch.manual_seed(2)
    expected = model(**batch).loss
    get_razor_model(model)
    assert isinstance(model, RazorOutermost)
    torch.manual_seed(2)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=0)
    assert "loss in bands" in repr(model)
    pixels = batch["labels"].numel() * model.config.num_labels * 4
    saved = measure_saved_bytes(model, **batch)
    assert dense.by_module[""] >= pixels
    assert saved.by_module.get("", 0) < 0.6 * pixels


def segformer() -> tuple[nn.Module, dict[str, Tensor]]:
    model, batch = make("segformer")
    return get_razor_model(model), batch


def test_logits_that_a_model_returns_resized_compute_themselves() -> None:
    """UperNet returns what it takes the loss of."""
    torch.manual_seed(0)
    plain, batch = make("upernet")
    razor = get_razor_model(copy.deepcopy(plain))
    torch.manual_seed(1)
    expected = plain(**batch).logits
    torch.manual_seed(1)
    logits = razor(**batch).logits
    assert isinstance(logits, LazyResizedLogits)
    assert logits.shape == expected.shape
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert torch.equal(logits * 1.0, expected)
    (logits * 1.0).sum().backward()
    assert all(p.grad is not None for name, p in razor.named_parameters() if "decode_head.classifier" in name)
    wide = razor(**batch).logits.float()
    assert isinstance(wide, LazyResizedLogits)


def test_what_reads_a_forward_still_finds_its_signature() -> None:
    model, _ = segformer()
    assert list(inspect.signature(model.forward).parameters)[:2] == ["pixel_values", "labels"]


def test_eval_and_no_grad_run_the_plain_code() -> None:
    model, batch = segformer()
    with torch.no_grad():
        assert model(**batch).loss.grad_fn is None
    model.eval()
    assert not any(isinstance(value, LazyResizedLogits) for value in model(**batch).values())


def test_a_model_that_is_extended_twice_is_copied_pickled_and_unloaded() -> None:
    model, batch = segformer()
    # Before the first forward: Transformers then adds hooks that cannot be pickled.
    others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    torch.manual_seed(3)
    expected = model(**batch).loss
    for other in others:
        torch.manual_seed(3)
        assert torch.equal(other(**batch).loss, expected)
        assert isinstance(other, RazorOutermost)
        assert type(other) is type(model)
    assert model.remove_razor() is model
    assert type(model) is hf.SegformerForSemanticSegmentation
    assert not [name for name in vars(model) if "razor" in name]


def test_estimate_counts_the_same() -> None:
    model, batch = segformer()
    estimated = estimate_saved_bytes(model, tuple(batch["pixel_values"].shape))
    assert estimated.total == pytest.approx(measure_saved_bytes(model, **batch).total, rel=0.01)


def test_the_compiler_gets_the_plain_model() -> None:
    model, batch = segformer()
    torch.manual_seed(5)
    expected = model(**batch).loss
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(5)
    torch.testing.assert_close(compiled(**batch).loss, expected, rtol=1e-4, atol=0)


class OwnLoss(nn.Module):
    """Somebody's own network, which calls functions where Transformers has modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x)), inplace=True), 2)
        x = F.silu(F.pad(self.second(x), (1, 0, 1, 0)))
        logits = F.interpolate(self.head(F.avg_pool2d(x, 2)), size=labels.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_functions_in_the_models_own_forward(preset: str) -> None:
    torch.manual_seed(0)
    plain = OwnLoss()
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset(preset))
    x, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    for model in (plain, razor):
        loss = model(x, labels)
        loss.backward()
    torch.testing.assert_close(loss, plain(x, labels), rtol=1e-5, atol=0)
    for (name, expected), found in zip(plain.named_parameters(), razor.parameters(), strict=True):
        if preset == "lossless":
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    flat = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (razor, plain)]
    assert F.cosine_similarity(*flat, dim=0) > 0.95
    dense = measure_saved_bytes(plain, x=x, labels=labels).total
    assert measure_saved_bytes(razor, x=x, labels=labels).total < (0.6 if preset == "lossless" else 0.2) * dense
