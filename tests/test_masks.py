"""Attention masks: restored to the bit, in memory linear in sequence length, shared, never stale."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_backrazor import get_razor_model
from hf_backrazor.functional.masks import pack_mask

LENGTH = 21
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
PADDING = torch.arange(LENGTH).expand(3, 1, 1, LENGTH) < torch.tensor([LENGTH, 4, 0]).view(3, 1, 1, 1)
RUNS = {
    "causal": CAUSAL[None, None],
    "window": (CAUSAL & CAUSAL.triu(-3))[None, None],
    "padded right": (CAUSAL & PADDING),
    "padded left": (CAUSAL & PADDING.flip(-1)),
    "padding alone": PADDING.expand(3, 2, LENGTH, LENGTH),
    "all": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool),
    "none": torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool),
    "two dimensions": CAUSAL,
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_each_row_takes_two_integers(name: str, dtype: torch.dtype) -> None:
    mask = RUNS[name]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    packed = pack_mask(mask)
    assert packed.layout.form == "runs"
    assert packed.part.numel() <= 2 * mask[..., 0].numel()
    restored = packed.layout.unpack(packed.part)
    assert restored.dtype == dtype
    assert torch.equal(restored, mask)


def test_an_expanded_mask_is_stored_once() -> None:
    assert pack_mask(PADDING.expand(3, 12, LENGTH, LENGTH)).part.numel() == 2 * 3


def test_any_other_mask_takes_a_bit_an_element() -> None:
    mask = torch.rand(2, 1, LENGTH, LENGTH) < 0.5
    packed = pack_mask(mask)
    assert packed.part.nbytes == 2 * LENGTH * -(-LENGTH // 8)
    assert torch.equal(packed.layout.unpack(packed.part), mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.randn(1, 1, 4, 4),
        torch.zeros(1, 1, 4, 4).fill_(-torch.inf),
        torch.zeros(1, 1, 4, 4, requires_grad=True),
        torch.ones(1, 1, 4, 4, dtype=torch.int64),
        torch.zeros(4),
    ],
)
def test_what_is_no_mask_of_two_values_stays_as_it_is(mask: torch.Tensor) -> None:
    packed = pack_mask(mask)
    assert packed.part is mask
    assert packed.layout.unpack(packed.part) is mask


def test_layers_share_a_mask_that_has_not_changed() -> None:
    mask = CAUSAL.clone()
    first = pack_mask(mask)
    assert pack_mask(mask) is first
    mask[0, 1] = True
    second = pack_mask(mask)
    assert torch.equal(second.layout.unpack(second.part), mask)


def test_who_copies_or_saves_a_mask_gets_its_values_alone(tmp_path: Path) -> None:
    mask = CAUSAL.clone()
    packed = pack_mask(mask)
    torch.save(mask, tmp_path / "mask.pt")
    for copied in (copy.deepcopy(mask), torch.load(tmp_path / "mask.pt")):
        assert torch.equal(copied, mask)
        assert pack_mask(copied) is not packed
        assert pack_mask(mask) is packed


def test_no_copy_outlives_the_graph() -> None:
    # `.data` leaves no trace in the version, so a copy from an earlier step would be stale.
    mask = CAUSAL.clone()
    packed = pack_mask(mask)
    del packed
    gc.collect()
    mask.data[0, 1] = True
    packed = pack_mask(mask)
    assert torch.equal(packed.layout.unpack(packed.part), mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_decoder_saves_bytes_linear_in_length(implementation: str) -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, use_cache=False)
    model = get_razor_model(GPT2LMHeadModel._from_config(config, attn_implementation=implementation)).train()
    saved = []
    for length in (128, 256, 512):
        ids = torch.arange(2 * length).view(2, length) % 50
        attention_mask = torch.ones_like(ids)
        attention_mask[0, length // 2 :] = 0
        report = model.memory_report(input_ids=ids, attention_mask=attention_mask, labels=ids)
        saved.append(report.razor_bytes)
    assert saved[2] - saved[1] == pytest.approx(2 * (saved[1] - saved[0]), rel=0.02)
