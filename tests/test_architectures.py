"""Every architecture: forward to the bit, gradients, state dict, saving, unloading."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, Batch, make
from torch import nn
from transformers import PreTrainedModel

from hf_backrazor import RazorConfig, get_razor_model


def step(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of the output, and gradients, of one training step with a fixed seed."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**batch)
    output.loss.backward()
    tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_forward(output: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert output.keys() == expected.keys()
    for name in expected:
        if name == "loss":  # computed in tiles, behind a language model's head
            torch.testing.assert_close(output[name], expected[name], rtol=1e-6, atol=0)
        else:
            assert torch.equal(output[name], expected[name]), name


ALL_KEPT_AS_IN_THE_PAPER = RazorConfig.preset("paper", sparsity=0.0, value_dtype="auto", activation_bits=32)


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_is_bit_equal_and_lossless_gradients_are_autograds(name: str, attention: str) -> None:
    model, batch = make(name, attention)
    plain_type, plain_repr, keys = type(model), repr(model), list(model.state_dict())
    expected, expected_grads = step(copy.deepcopy(model), batch)

    for config in (RazorConfig.preset("lossless"), ALL_KEPT_AS_IN_THE_PAPER):
        razor = get_razor_model(model, config)
        output, grads = step(razor, batch)
        assert_same_forward(output, expected)
        assert grads.keys() == expected_grads.keys()
        for parameter, grad in expected_grads.items():
            torch.testing.assert_close(
                grads[parameter], grad, rtol=1e-3, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
            )
        razor.remove_razor()

    for config, fidelity in (
        (RazorConfig.preset("paper", sparsity=0.9), 0.2),
        (RazorConfig(), 0.8),
        (RazorConfig.preset("fast"), 0.8),
    ):
        razor = get_razor_model(model, config)
        assert razor is model
        assert isinstance(razor, plain_type)
        assert list(razor.state_dict()) == keys
        output, grads = step(razor, batch)
        assert_same_forward(output, expected)
        assert grads.keys() == expected_grads.keys()
        flat, flat_expected = (torch.cat([g[k].flatten() for k in expected_grads]) for g in (grads, expected_grads))
        assert nn.functional.cosine_similarity(flat, flat_expected, dim=0) > fidelity
        report = razor.memory_report(**batch)
        assert report.razor_bytes < 0.6 * report.dense_bytes
        assert razor.remove_razor() is model
        assert type(model) is plain_type
        assert repr(model) == plain_repr
