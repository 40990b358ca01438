"""Logits that compute themselves: whoever uses them, and however, gets what dense logits give."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.functional import Resizing, interpolated_cross_entropy, linear_cross_entropy
from hf_backrazor.modules.lazy import LazyTensor

CLASSES, ITEMS, TOKENS = 50, 3, 8
_SIZES = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_embd=48, n_layer=1, n_head=4, vocab_size=CLASSES, n_positions=32, use_cache=False, bos_token_id=0,
        eos_token_id=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def gemma2() -> nn.Module:
    config = hf.Gemma2Config(
        **_SIZES, num_key_value_heads=2, head_dim=12, vocab_size=CLASSES, use_cache=False,
        final_logit_softcapping=2.0, attn_implementation="eager",
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config)


def bert() -> nn.Module:
    config = hf.BertConfig(
        **_SIZES, vocab_size=CLASSES, hidden_dropout_prob=0, attention_probs_dropout_prob=0, pad_token_id=0
    )
    return hf.BertForMaskedLM(config)


def segmentation() -> nn.Module:
    """One that returns its logits resized."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            logits = self.head(F.silu(self.first(images)))
            return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")

    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def forward(self, input_ids: Tensor) -> Any:
            images = torch.stack([input_ids.view(ITEMS, 2, 4)] * 3, 1).to(self.network.first.weight.dtype)
            logits = self.network(F.interpolate(images / CLASSES, size=(4, 8)))
            return hf.modeling_outputs.SemanticSegmenterOutput(logits=logits)

    return Resized()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "gemma2": gemma2,
    "bert": bert,
    "segmentation": segmentation,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that the loss is not that of a uniform guess
    return model


def razor(name: str, preset: str = "lossless") -> nn.Module:
    return get_razor_model(make(name), RazorConfig.preset(preset, min_numel=0))


def inputs() -> Tensor:
    return torch.arange(ITEMS * TOKENS).view(ITEMS, TOKENS) * 7 % CLASSES


def labels_of(z: Tensor) -> Tensor:
    labels = torch.arange(z.numel() // CLASSES) * 11 % CLASSES
    return labels if z.dim() == 3 else labels.view(z.shape[0], *z.shape[2:])


def rows(z: Tensor) -> Tensor:
    """As the cross entropy takes them."""
    return z.view(-1, CLASSES) if z.dim() == 3 else z


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(rows(z), labels_of(z))


def classes_of(z: Tensor) -> int:
    return z.dim() - 1 if z.dim() == 3 else 1


# Ways of using logits. Each takes them and returns a loss.


class OwnCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(z, labels)
        return F.cross_entropy(z, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, labels = ctx.saved_tensors
        probabilities = z.softmax(1)
        return grad * (probabilities - F.one_hot(labels, CLASSES).movedim(-1, 1)) / labels.numel(), None


class Doubled(torch.autograd.Function):
    """Passes its input on, and doubles the gradient: a backward of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, cloned: bool) -> Tensor:
        return z.clone() if cloned else z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad, None


@torch.jit.script
def scripted(z: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z, labels)


@torch.jit.script
def scripted_in_place(z: Tensor, labels: Tensor) -> Tensor:
    z.add_(1.5)
    z[:, 0] = -5.0
    return torch.nn.functional.cross_entropy(z * 2, labels)


def with_penalty(z: Tensor) -> Tensor:
    return cross_entropy(z) + 1e-2 * z.logsumexp(classes_of(z)).pow(2).mean()


def written_by_index(z: Tensor) -> Tensor:
    z[..., 0] = -9.0
    z[0] = z[1] * 2
    return cross_entropy(z)


def written_through_a_view(z: Tensor) -> Tensor:
    flat = z.reshape(-1) if z.is_contiguous() else z
    flat[1:9] = flat[11:19] * 3
    return cross_entropy(z)


def multiplied_in_place(z: Tensor) -> Tensor:
    before = z.clone()
    z.mul_(2)
    return cross_entropy(z) + cross_entropy(before)


def added_through_a_transposed_view(z: Tensor) -> Tensor:
    transposed = z.transpose(1, -1)
    before = z.clone()
    transposed.add_(z.detach().sin().transpose(1, -1))
    return cross_entropy(z) + cross_entropy(before)


def index_put(z: Tensor) -> Tensor:
    z.index_put_((torch.tensor([0, 1]), torch.tensor([1, 2])), torch.tensor(2.0, dtype=z.dtype))
    return cross_entropy(z)


def written_without_gradients(z: Tensor) -> Tensor:
    with torch.no_grad():
        z[..., 3] = 1.0
    return cross_entropy(z)


def written_through_data(z: Tensor) -> Tensor:
    z.data[..., 3] = 1.0
    return cross_entropy(z)


def written_through_numpy(z: Tensor) -> Tensor:
    z.detach().numpy()[0] = 1.0
    return cross_entropy(z + 0)


def hook(z: Tensor) -> Tensor:
    z.register_hook(lambda grad: 2 * grad)
    return cross_entropy(z)


def hook_after_the_view(z: Tensor) -> Tensor:
    flat = rows(z)
    z.register_hook(lambda grad: 2 * grad)
    return F.cross_entropy(flat, labels_of(z))


def hook_of_the_node(z: Tensor) -> Tensor:
    z.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
    return cross_entropy(z)


def retained_gradient(z: Tensor) -> Tensor:
    z.retain_grad()
    loss = cross_entropy(z)
    loss.backward(retain_graph=True)
    return loss + z.grad.pow(2).sum()


def gradient_by_the_logits(z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(z.softmax(classes_of(z)).log().mean(), z, create_graph=True)
    return cross_entropy(z) + grad.pow(2).sum()


def differentiated_twice(z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(cross_entropy(z.exp().log()), z, create_graph=True)
    return 100 * grad.pow(2).sum()


def metrics_before(z: Tensor) -> Tensor:
    with torch.no_grad():
        accuracy = (z.argmax(classes_of(z)).view(-1) == labels_of(z).view(-1)).double().mean()
        loss = cross_entropy(z)
    return cross_entropy(z) + accuracy + loss + float(z.detach().numpy().sum()) + sum(z.detach().view(-1).tolist())


def metrics_in_a_checkpoint(z: Tensor) -> Tensor:
    loss = checkpoint(with_penalty, z, use_reentrant=False)
    return loss + z.argmax(classes_of(z)).double().mean()


def distilled(z: Tensor) -> Tensor:
    teacher = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape).sin()
    dim = classes_of(z)
    student = F.log_softmax(z / 2, dim)
    return F.kl_div(student, F.log_softmax(teacher, dim), log_target=True, reduction="batchmean")


def entropy(z: Tensor) -> Tensor:
    p = z.softmax(classes_of(z))
    return -(p * p.log()).sum(classes_of(z)).mean()


def sampled_policy(z: Tensor) -> Tensor:
    """As policy gradients take them."""
    return F.log_softmax(z, classes_of(z)).gather(classes_of(z), labels_of(z).view(ITEMS, -1, 1)[..., :1]).mean()


def chosen(z: Tensor) -> Tensor:
    labels = labels_of(z).view(ITEMS, -1, 1) if z.dim() == 3 else labels_of(z).unsqueeze(1)
    return (z / 2).gather(classes_of(z), labels).tanh().mean()


def normalised(z: Tensor) -> Tensor:
    return z.logsumexp(classes_of(z)).square().mean()


def bounded(z: Tensor) -> Tensor:
    bounded = (z / 3).tanh() * 3
    return cross_entropy(bounded) + bounded.pow(2).mean()


def bounded_in_place(z: Tensor) -> Tensor:
    other = (z * 2).tanh()
    z.mul_(3)
    return cross_entropy(z) + cross_entropy(other.mul(2))


def mapped(z: Tensor) -> Tensor:
    labels = labels_of(z).view(z.shape[0], *z.shape[1:-1]) if z.dim() == 3 else labels_of(z)
    if z.dim() == 3:
        return torch.func.vmap(lambda x, y: F.cross_entropy(x, y, reduction="sum"))(z, labels).mean()
    return torch.func.vmap(lambda x, y: F.cross_entropy(x[None], y[None], reduction="sum"))(z, labels).mean()


def in_chunks(z: Tensor) -> Tensor:
    flat, labels = rows(z), labels_of(z)
    return sum(F.cross_entropy(x, y) for x, y in zip(flat.chunk(3), labels.chunk(3), strict=True))


def compiled(z: Tensor) -> Tensor:
    return torch.compile(with_penalty, backend="aot_eager")(z)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": cross_entropy,
    "own function": lambda z: OwnCrossEntropy.apply(rows(z), labels_of(z)),
    "own function before the loss": lambda z: cross_entropy(Doubled.apply(z, True)),
    "own function that returns its input": lambda z: cross_entropy(Doubled.apply(z, False)),
    "own function after the view": lambda z: F.cross_entropy(Doubled.apply(rows(z), True), labels_of(z)),
    "scripted": lambda z: scripted(rows(z), labels_of(z)),
    "scripted, in place": lambda z: scripted_in_place(rows(z), labels_of(z)) + z.mean(),
    "reentrant checkpoint": lambda z: checkpoint(cross_entropy, z, use_reentrant=True),
    "checkpoint": lambda z: checkpoint(with_penalty, z, use_reentrant=False),
    **{
        way.__name__.replace("_", " "): way
        for way in (
            *(metrics_in_a_checkpoint, with_penalty, written_by_index, written_through_a_view, multiplied_in_place),
            *(added_through_a_transposed_view, index_put, written_without_gradients, written_through_data),
            *(written_through_numpy, hook, hook_after_the_view, hook_of_the_node, retained_gradient),
            *(
                gradient_by_the_logits,
                differentiated_twice,
                metrics_before,
                distilled,
                entropy,
                bounded,
                chosen,
                normalised,
            ),
            *(bounded_in_place, mapped, in_chunks, compiled),
        )
    },
}


def loss_and_gradients(
    model: nn.Module, way: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    torch.manual_seed(1)
    z = model(input_ids=inputs()).logits
    loss = way(z)
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters()}, z


def assert_same(model: nn.Module, expected: nn.Module, way: Callable[[Tensor], Tensor]) -> None:
    loss, gradients, z = loss_and_gradients(model, way)
    assert isinstance(z, LazyTensor)
    expected_loss, expected_gradients, z = loss_and_gradients(expected, way)
    assert not isinstance(z, LazyTensor)
    torch.testing.assert_close(loss, expected_loss)
    for key, gradient in expected_gradients.items():
        assert (gradients[key] is None) == (gradient is None), key
        if gradient is not None:
            # Gemma's norms compute in float32.
            options = {"rtol": 1e-5, "atol": 1e-6, "msg": lambda text, key=key: f"{key}: {text}"}
            torch.testing.assert_close(gradients[key], gradient, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_the_dense_ones(name: str, way: str) -> None:
    assert_same(razor(name), make(name), WAYS[way])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("way", ["own function", "scripted", "reentrant checkpoint", "bounded", "distilled"])
def test_the_head_is_exact_in_the_default_preset(name: str, way: str) -> None:
    plain_head = razor(name, "balanced")
    plain_head.get_output_embeddings().razor_enabled = False
    assert_same(razor(name, "balanced"), plain_head, WAYS[way])


@pytest.mark.filterwarnings("ignore:.*register_backward_hook.*:FutureWarning")
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
def test_backward_hooks_of_the_head(name: str, register: str) -> None:
    models = (razor(name), make(name))
    for model in models:
        getattr(model.get_output_embeddings(), register)(lambda module, *grads: tuple(2 * g for g in grads[0]))
    assert_same(*models, cross_entropy)


# When it is too late


@pytest.mark.parametrize("way", [chosen, normalised])
def test_a_gradient_that_never_arrives_is_an_error_after_parts_of_a_loss(way: Callable[[Tensor], Tensor]) -> None:
    z = razor("gpt2")(input_ids=inputs()).logits
    loss = way(z)
    with pytest.raises(RuntimeError, match=r"comes too late: a loss of the .*logits"):
        torch.autograd.grad(loss, z)


@pytest.mark.parametrize("name", ["gpt2", "bert", "segmentation"])
@pytest.mark.parametrize(
    "look",
    [
        lambda z, loss: z.register_hook(lambda grad: 2 * grad),
        lambda z, loss: z.retain_grad(),
        lambda z, loss: z.grad,
        lambda z, loss: torch.autograd.grad(loss, z),
        lambda z, loss: torch.autograd.grad(loss, [z], allow_unused=True),
    ],
    ids=["hook", "retain_grad", "grad", "autograd.grad", "allow_unused"],
)
def test_a_gradient_that_never_arrives_is_an_error(name: str, look: Callable[[Tensor, Tensor], Any]) -> None:
    z = razor(name)(input_ids=inputs()).logits
    loss = cross_entropy(z)
    with pytest.raises(RuntimeError, match=r"comes too late: a loss of the .*logits"):
        look(z, loss)


def written_by_an_optimizer(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def written_without_a_version(model: nn.Module) -> None:
    model.get_output_embeddings().weight.data.mul_(1.01)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("preset", ["lossless", "balanced"])
@pytest.mark.parametrize("write", [written_by_an_optimizer, written_without_a_version])
def test_logits_of_other_weights_are_an_error(name: str, preset: str, write: Callable[[nn.Module], None]) -> None:
    model = razor(name, preset)
    z = model(input_ids=inputs()).logits
    cross_entropy(z).backward()
    write(model)
    for read in (cross_entropy, repr, lambda z: z.argmax(-1), lambda z: z + 1, lambda z: z.detach()):
        with pytest.raises(RuntimeError, match=r"logits of the head with 50 outputs .*before `optimizer.step\(\)`"):
            read(z)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("read", [lambda z: z.argmax(-1), lambda z: z.detach()], ids=["argmax", "detach"])
def test_logits_that_were_read_stay_what_they_were(name: str, read: Callable[[Tensor], Tensor]) -> None:
    model, plain = razor(name), make(name)
    z, expected = model(input_ids=inputs()).logits, plain(input_ids=inputs()).logits
    cross_entropy(z).backward()
    before = read(z)
    written_by_an_optimizer(model)
    torch.testing.assert_close(before, read(expected))
    torch.testing.assert_close(z.detach(), expected.detach())
    torch.testing.assert_close(cross_entropy(z).detach(), cross_entropy(expected).detach())


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "segmentation"])
@pytest.mark.parametrize("label", [CLASSES, CLASSES + 3, -1, -101])
def test_labels_out_of_range_are_refused_as_by_torch(name: str, label: int) -> None:
    messages = []
    for model in (razor(name), make(name)):
        z = model(input_ids=inputs()).logits
        labels = labels_of(z)
        labels.view(-1)[3] = label
        with pytest.raises(IndexError) as error:
            F.cross_entropy(rows(z), labels)
        messages.append(str(error.value))
    assert messages[0] == messages[1] == f"Target {label} is out of bounds."


def test_losses_by_themselves_refuse_labels_out_of_range() -> None:
    labels = torch.tensor([0, 7, -100])
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(7, 4), None, labels)
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
        interpolated_cross_entropy(
            torch.randn(1, 7, 1, 1), labels.view(1, 1, 3), Resizing((1, 3), "bilinear", False), ignore_index=-100
        )
    on_meta = (torch.randn(3, 4, device="meta"), torch.randn(7, 4, device="meta"), None, labels.to("meta"))
    assert linear_cross_entropy(*on_meta).is_meta


def test_a_shape_that_changes_in_place_is_refused() -> None:
    z = razor("gpt2")(input_ids=inputs()).logits
    with pytest.raises(RuntimeError, match="`unsqueeze_` gives logits"):
        z.unsqueeze_(0)


# What reads memory, copies and casts


@pytest.mark.parametrize("name", ["gpt2", "bert", "segmentation"])
def test_logits_are_copied_stored_and_cast_as_dense_ones(name: str) -> None:
    expected, model = make(name)(input_ids=inputs()), razor(name)
    dense = expected.logits.detach()

    def outputs() -> Any:
        return model(input_ids=inputs())

    assert torch.equal(pickle.loads(pickle.dumps(outputs().logits)), dense)
    assert torch.equal(pickle.loads(pickle.dumps(outputs().logits.detach())), dense)
    file = io.BytesIO()
    torch.save(outputs().logits, file)
    file.seek(0)
    assert torch.equal(torch.load(file), dense)
    assert torch.equal(copy.deepcopy(outputs().logits.detach()), dense)
    for x in (outputs().logits, expected.logits):
        with pytest.raises(RuntimeError, match="support the deepcopy protocol"):
            copy.deepcopy(x)
        with pytest.raises(RuntimeError, match="Can't call numpy"):
            x.numpy()
    assert outputs().logits.tolist() == dense.tolist()
    assert (outputs().logits.data.numpy() == dense.numpy()).all()
    assert torch.equal(torch.from_dlpack(outputs().logits.detach()), dense)
    assert torch.equal(outputs().logits.cpu() + 0, dense)
    assert torch.equal(outputs().to_tuple()[0] + 0, dense)
    assert torch.equal(convert_outputs_to_fp32(outputs)().logits + 0, dense)
    assert torch.equal(outputs().logits.to(torch.bfloat16), dense.bfloat16())
    logits = outputs().logits
    assert logits.untyped_storage().nbytes() == dense.untyped_storage().nbytes()
    assert logits.data_ptr() == logits.detach().data_ptr() != 0
    assert (logits.stride(), logits.storage_offset()) == (dense.stride(), 0)
    part, dense_part = logits[1, 2:5], dense[1, 2:5]
    assert (part.stride(), part.storage_offset()) == (dense_part.stride(), dense_part.storage_offset())
    assert torch.equal(logits.as_strided((2, 3), (5, 1), 4), dense.as_strided((2, 3), (5, 1), 4))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_and_the_bits_of_the_dense_model(name: str, dtype: torch.dtype) -> None:
    model, plain = razor(name).float(), make(name).float()
    with torch.autocast("cpu", dtype):
        z, expected = model(input_ids=inputs()).logits, plain(input_ids=inputs()).logits
    assert (z.dtype, z.stride()) == (expected.dtype, expected.stride())
    grads = []
    for x, m in ((z, model), (expected, plain)):
        x.float().pow(2).mean().backward()
        grads.append([p.grad for p in m.parameters()])
    assert torch.equal(z.detach(), expected.detach())
    for found, wanted in zip(*grads, strict=True):
        largest = wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * largest + 1e-12)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "segmentation"])
@pytest.mark.parametrize(
    "use",
    [cross_entropy, with_penalty, bounded, multiplied_in_place, repr, lambda z: z.detach(), hook],
    ids=["loss", "penalty", "bounded", "in place", "repr", "detach", "hook"],
)
def test_nothing_outlives_the_outputs(name: str, use: Callable[[Tensor], Any]) -> None:
    model = razor(name)
    model(input_ids=inputs())  # what is watched in the first forward is over
    gc.collect()
    gc.disable()
    try:
        z = model(input_ids=inputs()).logits
        computation = z.description.computation
        watched = [weakref.ref(x) for x in (z, z._elements, computation, computation.inputs[0])]
        kept = use(z)
        del z, computation
        if not isinstance(kept, str) and kept.requires_grad:
            kept.backward()
        del kept
        assert [x() for x in watched] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_tiled_loss_holds_nothing_but_what_it_saves(name: str) -> None:
    model = razor(name)
    z = model(input_ids=inputs()).logits
    watched = [weakref.ref(x) for x in (z, z._elements, z.description.computation)]
    loss = cross_entropy(z)
    z.argmax(-1)
    del z
    gc.collect()
    assert [x() for x in watched] == [None] * 3
    loss.backward()
