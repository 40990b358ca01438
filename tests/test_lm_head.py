"""Language model heads: the loss of the dense model and its gradients, without the logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_pt_utils import LabelSmoother

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from hf_backrazor.functional import linear_cross_entropy, linear_gather
from hf_backrazor.modules.lm_head import LazyLogits

TOKENS, FEATURES, CLASSES = 10, 5, 23


def soft_cap(z: Tensor) -> Tensor:
    return torch.tanh(z / 3) * 3


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small problems have one tile; with these settings several of tokens and of classes, the last ones smaller."""
    if request.param == "many tiles":
        module = __import__("sys").modules["hf_backrazor.functional.linear_cross_entropy"]
        monkeypatch.setitem(module.TILE_NUMEL, "cpu", 28)
        monkeypatch.setattr(module, "MIN_CLASSES", 7)
    return request.param


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,)))
    labels = torch.randint(0, CLASSES, (TOKENS,))
    labels[[0, 4]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("elementwise", [None, soft_cap], ids=["plain", "soft cap"])
def test_gradcheck(reduction: str, smoothing: float, elementwise: Callable | None, tiles: str) -> None:
    hidden, weight, bias, labels = case()
    options = {"label_smoothing": smoothing, "reduction": reduction}
    for b in (bias, None):
        inputs = (hidden, weight, bias) if b is not None else (hidden, weight)

        def loss(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return linear_cross_entropy(h, w, b, labels, elementwise, **options)

        logits = F.linear(*inputs)
        logits = logits if elementwise is None else elementwise(logits)
        torch.testing.assert_close(loss(*inputs), F.cross_entropy(logits, labels, **options))
        assert gradcheck(loss, inputs)


def test_only_the_gradients_that_are_wanted(tiles: str) -> None:
    hidden, weight, bias, labels = case()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight, bias), labels), (hidden, weight, bias))
    for i, tensor in enumerate((hidden, weight, bias)):
        inputs = [t.detach() for t in (hidden, weight, bias)]
        inputs[i] = tensor
        (grad,) = torch.autograd.grad(linear_cross_entropy(*inputs, labels), tensor)
        torch.testing.assert_close(grad, expected[i])


def test_nothing_to_count_gives_what_torch_gives() -> None:
    hidden, weight, bias, labels = case()
    labels.fill_(-100)
    assert linear_cross_entropy(hidden, weight, bias, labels).isnan()
    loss = linear_cross_entropy(hidden, weight, bias, labels, reduction="sum")
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 200, "max_position_embeddings": 64}
MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=200, n_positions=64, use_cache=False)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, use_cache=False)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_DECODER, final_logit_softcapping=2.0, attn_implementation="eager", use_cache=False)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SIZES, vocab_size=200)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, vocab_size=200, use_cache=False,
            decoder_start_token_id=0, pad_token_id=0,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=200, use_cache=False,
        )
    ),
}  # fmt: skip
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[Any, dict[str, Tensor]]:
    model = MODELS[name]().train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that the loss is not that of a uniform guess
    tokens = torch.randint(2, 200, (3, 20))
    labels = tokens.clone()
    labels[:, :4] = -100
    return model, {"input_ids": tokens, "labels": labels}


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@EACH_MODEL
def test_loss_and_gradients_are_the_dense_ones(name: str, tiles: str) -> None:
    model, batch = make(name)
    batches = [batch]
    if name in ("gpt2", "llama", "gemma2"):
        batches.append({**batch, "num_items_in_batch": torch.tensor(31)})
    expected = [loss_and_gradients(model, b) for b in batches]
    get_razor_model(model, RazorConfig.preset("lossless"))
    for b, (loss, gradients) in zip(batches, expected, strict=True):
        ours, our_gradients = loss_and_gradients(model, b)
        torch.testing.assert_close(ours, loss)
        assert our_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-3, atol=1e-5 * scale + 1e-7)


@EACH_MODEL
@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_heads_gradient_is_exact_in_every_preset(name: str, preset: str) -> None:
    model, batch = make(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied
    _, expected = loss_and_gradients(model, batch)
    name_of_head = next(n for n, p in model.named_parameters() if p is head.weight)
    get_razor_model(model, RazorConfig.preset(preset))
    _, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(gradients[name_of_head], expected[name_of_head], rtol=1e-4, atol=1e-6)


class TensorSizes(TorchDispatchMode):
    """Notes how many elements the tensors have that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not isinstance(x, LazyLogits) and not x.is_meta:
                self.numels.add(x.numel())
        return result


@EACH_MODEL
def test_logits_never_exist_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(name)
    batch = {key: x.repeat(4, 3)[:, :53].contiguous() for key, x in batch.items()}  # 12 x 53 tokens, 200 classes
    get_razor_model(model, RazorConfig())
    module = __import__("sys").modules["hf_backrazor.functional.linear_cross_entropy"]
    monkeypatch.setitem(module.TILE_NUMEL, "cpu", 20_000)
    monkeypatch.setattr(module, "MIN_CLASSES", 20)
    watch = TensorSizes()
    model(**batch)  # what is watched in the first forward is over
    with watch:
        model(**batch).loss.backward()
    assert 12 * 52 * 200 not in watch.numels
    assert 12 * 53 * 200 not in watch.numels


def test_saved_bytes_grow_with_the_features_and_not_with_the_vocabulary() -> None:
    sizes = []
    for vocabulary in (500, 5000):
        config = hf.GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=vocabulary, use_cache=False)
        model = get_razor_model(hf.GPT2LMHeadModel(config))
        tokens = torch.randint(0, 500, (2, 64))
        sizes.append(measure_saved_bytes(model, input_ids=tokens, labels=tokens).total)
    assert sizes[0] == sizes[1]


@EACH_MODEL
def test_logits_are_there_when_asked_for(name: str) -> None:
    model, batch = make(name)
    torch.manual_seed(1)
    expected = model(**batch).logits
    get_razor_model(model, RazorConfig.preset("lossless"))
    torch.manual_seed(1)
    outputs = model(**batch)
    logits = outputs.logits
    assert isinstance(logits, Tensor)
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(logits + 0, expected)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits[:, -1].detach(), expected[:, -1])
    assert torch.equal(outputs.to_tuple()[1] + 0, expected)
    assert "tensor(" in repr(logits)
    weight = model.get_output_embeddings().weight
    (grad,) = torch.autograd.grad(logits.square().mean(), weight, retain_graph=True)
    torch.manual_seed(1)
    model.remove_razor()
    (expected_grad,) = torch.autograd.grad(model(**batch).logits.square().mean(), weight)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)


def test_own_losses_of_the_logits() -> None:
    model, batch = make("gpt2")
    labels = batch.pop("labels")

    def own(logits: Tensor) -> Tensor:
        flat = logits[..., :-1, :].contiguous().float().view(-1, logits.size(-1))
        return F.cross_entropy(flat, labels[..., 1:].reshape(-1)) + logits.logsumexp(-1).mean()

    torch.manual_seed(1)
    expected = own(model(**batch).logits)
    get_razor_model(model, RazorConfig.preset("lossless"))
    torch.manual_seed(1)
    torch.testing.assert_close(own(model(**batch).logits), expected)


def test_logits_written_to_are_what_the_loss_sees() -> None:
    model, batch = make("gpt2")
    labels = batch.pop("labels").view(-1)

    def masked() -> Tensor:
        torch.manual_seed(1)
        logits = model(**batch).logits
        logits[..., 100:] = -1e4
        return F.cross_entropy(logits.view(-1, 200), labels)

    expected = masked()
    get_razor_model(model, RazorConfig.preset("lossless"))
    torch.testing.assert_close(masked(), expected)


@pytest.mark.parametrize("shift", [False, True])
def test_trainers_label_smoothing_does_without_logits(shift: bool, tiles: str) -> None:
    model, batch = make("gpt2")
    labels = batch.pop("labels")

    def smoothed() -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        outputs = model(**batch)
        assert outputs.logits.shape == (3, 20, 200)
        loss = LabelSmoother(0.2)(outputs, labels, shift_labels=shift)
        return loss, torch.autograd.grad(loss, model.transformer.h[0].mlp.c_fc.weight)[0]

    expected = smoothed()
    get_razor_model(model, RazorConfig.preset("lossless"))
    watch = TensorSizes()
    with watch:
        torch.testing.assert_close(smoothed(), expected)
    if tiles == "many tiles":
        assert 3 * (19 if shift else 20) * 200 not in watch.numels


@pytest.mark.parametrize("chosen", [1, 3])
def test_gradcheck_of_chosen_outputs(chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules["hf_backrazor.functional.linear_gather"]
    monkeypatch.setattr(module, "CHUNK_NUMEL", 4 * FEATURES * chosen)  # the last slice of tokens is smaller
    hidden, weight, bias, _ = case()
    index = torch.randint(0, CLASSES, (TOKENS, chosen))
    torch.testing.assert_close(
        linear_gather(hidden, weight, bias, index), F.linear(hidden, weight, bias).gather(-1, index)
    )
    assert gradcheck(lambda h, w, b: linear_gather(h, w, b, index), (hidden, weight, bias))
    assert gradcheck(lambda h, w: linear_gather(h, w, None, index), (hidden, weight))
    assert gradcheck(lambda h: linear_gather(h, weight.detach(), None, index), (hidden,))


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    """As TRL computes it."""
    logits = logits / temperature
    if logits.dtype == torch.float32:
        selected = torch.gather(logits, dim=-1, index=index)
        return selected - torch.stack([torch.logsumexp(each, dim=-1) for each in logits]).unsqueeze(-1)
    rows = []
    for each, labels in zip(logits, index, strict=True):
        rows.append(F.log_softmax(each, dim=-1).gather(dim=-1, index=labels))
    return torch.stack(rows)


@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_log_probabilities_of_chosen_tokens_do_without_logits(name: str, chosen: int) -> None:
    model, batch = make(name)
    labels = batch.pop("labels").unsqueeze(-1).expand(-1, -1, chosen)
    labels = (labels.clamp(min=0) + torch.arange(chosen)) % 200
    vocabulary = model.config.vocab_size

    def log_probabilities() -> dict[str, Tensor]:
        torch.manual_seed(1)
        logits = model(**batch).logits
        found = selective_log_softmax(logits[:, :-1], labels[:, 1:], temperature=0.7)
        loss = (found * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum()
        model.zero_grad()
        loss.backward()
        return {"": found.detach(), **{key: p.grad.clone() for key, p in model.named_parameters()}}

    expected = log_probabilities()
    get_razor_model(model, RazorConfig.preset("lossless"))
    watch = TensorSizes()
    with watch:
        found = log_probabilities()
    for key, value in expected.items():
        assert torch.linalg.vector_norm(found[key] - value) <= 1e-5 * torch.linalg.vector_norm(value), key
    tokens = labels[:, :, 0].numel()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_log_softmax(model(**batch).logits[:, :-1], labels[:, 1:], temperature=0.7)
    assert max(saved) >= 200  # something is saved
    assert not {tokens * vocabulary, (tokens - labels.shape[0]) * vocabulary} & set(saved)


def test_log_probabilities_under_autocast() -> None:
    model, batch = make("llama")
    labels = batch.pop("labels").clamp(min=0).unsqueeze(-1)

    def log_probabilities(widen: bool) -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch).logits
            logits = logits.float() if widen else logits
            return selective_log_softmax(logits, labels, temperature=1.0)

    expected = [log_probabilities(widen) for widen in (True, False)]
    get_razor_model(model, RazorConfig.preset("lossless"))
    for widen, values in zip((True, False), expected, strict=True):
        found = log_probabilities(widen)
        assert found.dtype == values.dtype
        torch.testing.assert_close(found, values, rtol=2e-2, atol=2e-2)


def test_computing_the_logits_whole_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    hf.logging.get_logger("hf_backrazor").propagate = True
    model, batch = make("gpt2")
    model.resize_token_embeddings(211)  # a number of its own: the notice is given once for each text
    get_razor_model(model)
    outputs = model(**batch)
    with caplog.at_level("WARNING"):
        outputs.loss.backward()
        assert "211" not in caplog.text
        model(**batch).logits.exp()
    assert "211 outputs" in caplog.text
    assert "`exp`" in caplog.text


def test_sixteen_bits_and_autocast() -> None:
    model, batch = make("llama")
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch)
    get_razor_model(model, RazorConfig.preset("lossless"))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
    assert outputs.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == expected.loss.dtype
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-3, atol=1e-3)
    outputs.loss.backward()
    weight = model.lm_head.weight
    gradient, weight.grad = weight.grad, None
    expected.loss.backward()
    assert F.cosine_similarity(gradient.flatten(), weight.grad.flatten(), dim=0) > 0.999

    model = model.remove_razor().bfloat16()
    loss, gradients = loss_and_gradients(model, batch)
    get_razor_model(model, RazorConfig.preset("lossless"))
    ours, our_gradients = loss_and_gradients(model, batch)
    assert ours.dtype == loss.dtype
    assert our_gradients["lm_head.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(ours, loss, rtol=1e-2, atol=1e-2)
    cosine = F.cosine_similarity(*(g["lm_head.weight"].float().flatten() for g in (gradients, our_gradients)), dim=0)
    assert cosine > 0.999


def test_outputs_can_be_copied_and_pickled_like_dense_ones() -> None:
    model, batch = make("gpt2")
    get_razor_model(model)
    outputs = model(**batch)
    detached = outputs.logits.detach()
    assert torch.equal(pickle.loads(pickle.dumps(detached)), detached)
    assert torch.equal(copy.deepcopy(detached), detached)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "lm_head"]], ids=["body", "head too"])
def test_lora_with_a_frozen_head(targets: list[str]) -> None:
    model, batch = make("gpt2")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False))
    loss, gradients = loss_and_gradients(model, batch)
    model = get_razor_model(model, RazorConfig.preset("lossless"))
    ours, our_gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(ours, loss)
    assert gradients
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-3, atol=1e-5)


def test_nothing_lazy_in_eval_mode_or_without_gradients() -> None:
    model, batch = make("gpt2")
    get_razor_model(model)
    with torch.no_grad():
        assert type(model(**batch).logits) is Tensor
    assert type(model.eval()(**batch).logits) is Tensor
