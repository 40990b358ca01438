"""Blocks that are computed again from their packed input (`recompute="blocks"`)."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, checkpoint_activations, make
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.functional.stream import Stream
from hf_backrazor.modules import RazorBlock
from hf_backrazor.packing import PackSpec
from hf_backrazor.report import measure_saved_bytes

EXACT = RazorConfig.preset("lossless", recompute="blocks")
COMPACT = RazorConfig.preset("compact")


def llama(layers: int = 4, **changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
    }
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).train()


def tokens(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, 64, (rows, length))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def language_loss(model: nn.Module, ids: Tensor, **others: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids, labels=ids, **others).loss


def assert_close(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def cosine(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert grads.keys() == expected.keys()
    flat, flat_expected = (torch.cat([g[name].flatten().double() for name in expected]) for g in (grads, expected))
    return float(F.cosine_similarity(flat, flat_expected, dim=0))


def checkpointed_bytes(model: PreTrainedModel, **batch: Any) -> int:
    model = copy.deepcopy(model)
    checkpoint_activations(model)
    return measure_saved_bytes(model, **batch).total


class TestStream:
    def test_each_input_is_restored_within_its_own_codes_error(self) -> None:
        # Each code is of what the codes before it left, so that errors do not add up over the blocks.
        inputs = [torch.randn(4, 32, 256)]
        for _ in range(40):
            inputs.append(inputs[-1] + 0.1 * torch.randn(4, 32, 256))
        stream = Stream(inputs[0])
        spec = PackSpec(0.99, bits=4)
        stored = [stream.append(x, PackSpec(0.99, bits=8) if i == 0 else spec) for i, x in enumerate(inputs)]
        stream.end()
        for x, each in zip(reversed(inputs), reversed(stored), strict=True):
            assert (stream.restore(each) - x).norm() < 0.015 * x.norm()

    def test_any_order_restores_the_same(self) -> None:
        inputs = [torch.randn(8, 64) for _ in range(5)]
        stream = Stream(inputs[0])
        stored = [stream.append(x, PackSpec(0.9, bits=4)) for x in inputs]
        in_order = [stream.restore(each) for each in reversed(stored)][::-1]
        for place in (4, 1, 3, 3, 0, 2, 4, 0):
            torch.testing.assert_close(stream.restore(stored[place]), in_order[place], rtol=1e-5, atol=1e-5)

    def test_a_stream_that_ended_restores_to_the_bit_what_it_would_have(self) -> None:
        inputs = [torch.randn(8, 64) for _ in range(5)]
        streams = [Stream(inputs[0]), Stream(inputs[0])]
        stored = [[stream.append(x, PackSpec(0.9, bits=3)) for x in inputs] for stream in streams]
        streams[0].end()
        assert streams[0].sum_bytes == 0
        assert streams[1].sum_bytes == inputs[0].nbytes
        assert torch.equal(streams[0].restore(stored[0][4]), streams[1].restore(stored[1][4]))

    def test_inputs_below_that_are_gone_are_an_error(self) -> None:
        x = torch.randn(8, 64)
        stream = Stream(x)
        stored = [stream.append(x, PackSpec(0.9, bits=4)) for _ in range(3)]
        stream.restore(stored[0])
        del stored[1]
        with pytest.raises(RuntimeError, match="retain_graph"):
            stream.restore(stored[1])

    def test_a_restored_input_does_not_change_later(self) -> None:
        x = torch.randn(8, 64)
        stream = Stream(x)
        stored = [stream.append(x * (i + 1), PackSpec(0.9, bits=4)) for i in range(3)]
        last = stream.restore(stored[2])
        before = last.clone()
        stream.restore(stored[1])
        assert torch.equal(last, before)


@pytest.mark.filterwarnings("ignore:saved dense", "ignore:the model returns a cache")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ARCHITECTURES
        if any(c.__name__ == "GradientCheckpointingLayer" for m in make(name)[0].modules() for c in type(m).__mro__)
    ],
)
def test_architectures(name: str, attention: str) -> None:
    model, batch = make(name, attention)

    def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        kept = []
        grads = gradients(model, lambda: kept.append(model(**batch)) or kept[0].loss)
        output = kept[0].get("logits", kept[0].get("last_hidden_state"))
        return output, grads

    expected, expected_grads = step(copy.deepcopy(model))
    checkpointing = checkpointed_bytes(model, **batch)
    for config in (EXACT, COMPACT):
        razor = get_razor_model(model, config)
        output, grads = step(razor)
        if expected is not None:
            assert torch.equal(output, expected)
        if config is EXACT:
            for parameter, grad in expected_grads.items():
                torch.testing.assert_close(grads[parameter], grad, rtol=1e-3, atol=1e-5)
        else:
            assert cosine(grads, expected_grads) > 0.95
            assert measure_saved_bytes(razor, **batch).total < 0.7 * checkpointing
        assert razor.remove_razor() is model
        assert not any(isinstance(module, RazorBlock) for module in model.modules())


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "use_cache": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, **EXPERTS)),
    "state space": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=8)),
    "hybrid": lambda: JambaForCausalLM(
        JambaConfig(
            **SIZES,
            **HEADS,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
        )
    ),
    "encoder and decoder": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            use_cache=False,
            decoder_start_token_id=0,
        )
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_of_other_kinds(kind: str) -> None:
    model, ids = OTHERS[kind]().train(), tokens()
    expected = gradients(model, language_loss(model, ids))
    assert_close(gradients(get_razor_model(model, EXACT), language_loss(model, ids)), expected)
    assert cosine(gradients(get_razor_model(model.remove_razor(), COMPACT), language_loss(model, ids)), expected) > 0.98
    saved = measure_saved_bytes(model, input_ids=ids, labels=ids).total
    assert saved < 0.5 * checkpointed_bytes(model.remove_razor(), input_ids=ids, labels=ids)


def test_experts_that_run_one_after_the_other_get_the_tokens_that_they_had() -> None:
    torch.manual_seed(0)
    model, ids = OTHERS["experts"]().train(), tokens(4, 128)
    model.set_experts_implementation("eager")
    expected = gradients(model, language_loss(model, ids))
    razor = get_razor_model(model, COMPACT)
    assert cosine(gradients(razor, language_loss(razor, ids)), expected) > 0.999
    exact = measure_saved_bytes(razor, input_ids=ids, labels=ids).by_module["model.layers.1"]
    razor.set_experts_implementation("grouped_mm")
    assert measure_saved_bytes(razor, input_ids=ids, labels=ids).by_module["model.layers.1"] < 0.3 * exact


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if (inputs, stride) != (outputs, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                [Bottleneck(inputs, outputs, stride), Bottleneck(outputs, outputs, 1), Bottleneck(outputs, outputs, 1)]
            )
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2))
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Blocks that are given a time embedding, with connections from the way down to the way up."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
            self.time = nn.Linear(8, outputs)
            self.short = nn.Conv2d(inputs, outputs, 1)

        def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
            return self.short(x) + self.conv(F.silu(self.norm(x))) + self.time(embedded_time)[:, :, None, None]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.down = nn.ModuleList([self.Block(16, 16), self.Block(16, 32)])
        self.middle = self.Block(32, 32)
        self.up = nn.ModuleList([self.Block(64, 16), self.Block(32, 16)])

    def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
        x, skipped = self.stem(x), []
        for block in self.down:
            x = block(x, embedded_time)
            skipped.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, embedded_time)
        for block in self.up:
            x = torch.cat([F.interpolate(x, scale_factor=2.0), skipped.pop()], 1)
            x = block(x, embedded_time)
        return self.out(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_residual_network_of_stages(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = ResNet().train()
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=memory_format)

    def loss() -> Tensor:
        return model(images).square().sum()

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dense = copy.deepcopy(model)
    expected = gradients(dense, lambda: dense(images).square().sum())
    get_razor_model(model, RazorConfig.preset("lossless", recompute="blocks", recompute_modules=["Bottleneck"]))
    assert_close(gradients(model, loss), expected)
    # A batch norm that ran again would have moved its statistics twice.
    model.remove_razor()
    model.load_state_dict(buffers, strict=False)
    config = RazorConfig.preset("compact", recompute_modules=["Bottleneck"])
    get_razor_model(model, config)
    assert cosine(gradients(model, loss), expected) > 0.97
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(dense.named_buffers())[name])


def test_blocks_that_draw_random_numbers_of_others_than_torch() -> None:
    class Drawing(UNet.Block):
        def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
            return super().forward(x * random.random() * np.random.rand(), embedded_time)

    model, images, time = UNet(), torch.randn(2, 3, 16, 16), torch.randn(2, 8)
    model.middle = Drawing(32, 32)
    dense = copy.deepcopy(model.train())

    def loss(model: nn.Module) -> Tensor:
        random.seed(0)
        np.random.seed(0)
        return model(images, time).square().sum()

    expected = gradients(dense, lambda: loss(dense))
    config = RazorConfig.preset("lossless", recompute="blocks", recompute_modules=["Drawing"])
    get_razor_model(model, config)
    for _ in range(2):
        assert_close(gradients(model, lambda: loss(model)), expected)


def test_u_shaped_network_with_side_inputs() -> None:
    model, images, time = UNet().train(), torch.randn(2, 3, 16, 16), torch.randn(2, 8)

    def loss() -> Tensor:
        return model(images, time).square().mean()

    expected = gradients(model, loss)
    get_razor_model(model, RazorConfig.preset("lossless", recompute="blocks", recompute_modules=["Block"]))
    assert_close(gradients(model, loss), expected)
    get_razor_model(model.remove_razor(), RazorConfig.preset("compact", recompute_modules=["Block"]))
    assert cosine(gradients(model, loss), expected) > 0.98


def test_spectral_norm_steps_once() -> None:
    model = nn.ModuleList([nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)) for _ in range(3)]).train()
    x = torch.randn(4, 16)

    def loss(model: nn.ModuleList) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            y = x
            for layer in model:
                y = layer(y)
            return y.square().sum()

        return compute

    dense = copy.deepcopy(model)
    config = RazorConfig.preset("lossless", recompute="blocks", recompute_modules=["Linear"])
    razor = get_razor_model(model, config)
    for _ in range(3):
        assert_close(gradients(razor, loss(razor)), gradients(dense, loss(dense)))
    for buffer, expected in zip(razor.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


class TestTraining:
    def test_accumulated_gradients_and_forwards_before_one_backward(self) -> None:
        model, first, second = llama(), tokens(), tokens(3, 9)
        expected = gradients(model, lambda: language_loss(model, first)() + language_loss(model, second)())
        get_razor_model(model, EXACT)
        assert_close(gradients(model, lambda: language_loss(model, first)() + language_loss(model, second)()), expected)
        get_razor_model(model.remove_razor(), COMPACT)
        together = gradients(model, lambda: language_loss(model, first)() + language_loss(model, second)())
        assert cosine(together, expected) > 0.99
        one, other = (gradients(model, language_loss(model, ids)) for ids in (first, second))
        assert_close({name: one[name] + other[name] for name in one}, together)

    def test_a_retained_graph_gives_the_same_gradients_again(self) -> None:
        model, ids = get_razor_model(llama(), COMPACT), tokens()
        loss = language_loss(model, ids)()
        loss.backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        loss.backward()
        assert_close({name: p.grad for name, p in model.named_parameters()}, first)

    @pytest.mark.parametrize("layer", [1, 2, 3])
    def test_a_loss_on_the_output_of_a_block_in_the_middle(self, layer: int) -> None:
        # The blocks above are never run again, and are gone before backward begins.
        model, ids = llama(), tokens()

        def loss() -> Tensor:
            return model.model(input_ids=ids, output_hidden_states=True).hidden_states[layer].square().mean()

        expected = gradients(model, loss)
        assert cosine(gradients(get_razor_model(model, COMPACT), loss), expected) > 0.99

    def test_losses_on_several_blocks_one_after_the_other(self) -> None:
        model, ids = llama(), tokens()

        def loss() -> Tensor:
            states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
            states[3].square().mean().backward(retain_graph=True)
            states[1].square().mean().backward(retain_graph=True)
            return states[4].mean()

        expected = gradients(model, loss)
        assert cosine(gradients(get_razor_model(model, COMPACT), loss), expected) > 0.99

    def test_gradients_of_chosen_inputs_and_second_derivatives(self) -> None:
        model, ids = llama(attn_implementation="eager"), tokens()
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()

        def penalty(model: LlamaForCausalLM) -> Tensor:
            logits = model(inputs_embeds=embedded).logits
            (grad,) = torch.autograd.grad(logits.square().mean(), embedded, create_graph=True)
            return grad.square().sum() + logits.mean()

        expected = gradients(model, lambda: penalty(model))
        assert_close(gradients(get_razor_model(model, EXACT), lambda: penalty(model)), expected)

    def test_dropout_is_replayed(self) -> None:
        model, batch = make("bert", "sdpa")
        model.config.hidden_dropout_prob = 0.3
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        expected = gradients(model, lambda: model(**batch).loss)
        assert_close(gradients(get_razor_model(model, EXACT), lambda: model(**batch).loss), expected)
        after = torch.get_rng_state()
        gradients(model.remove_razor(), lambda: model(**batch).loss)
        assert torch.equal(after, torch.get_rng_state())

    def test_autocast(self) -> None:
        model, ids = llama(), tokens()

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return language_loss(model, ids)()  # backward runs outside

        expected = gradients(model, loss)
        assert_close(gradients(get_razor_model(model, EXACT), loss), expected)
        assert cosine(gradients(get_razor_model(model.remove_razor(), COMPACT), loss), expected) > 0.99

    def test_bfloat16(self) -> None:
        model, ids = llama().bfloat16(), tokens()
        expected = gradients(model, language_loss(model, ids))
        assert cosine(gradients(get_razor_model(model, COMPACT), language_loss(model, ids)), expected) > 0.98

    def test_an_exception_in_a_forward_leaves_nothing_behind(self) -> None:
        model, ids = llama(), tokens()
        get_razor_model(model, COMPACT)
        expected = gradients(model, language_loss(model, ids))
        handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            language_loss(model, tokens())()
        handle.remove()
        gc.collect()
        assert not any(True for block in model.model.layers for _ in block.razor_stack.streams)
        assert_close(gradients(model, language_loss(model, ids)), expected)

    def test_nothing_is_kept_without_gradients_or_in_evaluation(self) -> None:
        model, ids = get_razor_model(llama(), COMPACT), tokens()
        with torch.no_grad():
            model(input_ids=ids)
        model.eval()
        logits = model(input_ids=ids).logits
        assert not any(True for block in model.model.layers for _ in block.razor_stack.streams)
        assert torch.equal(logits, model.remove_razor()(input_ids=ids).logits)

    def test_frozen_blocks_keep_nothing(self) -> None:
        model, ids = llama(), tokens()
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[:2].requires_grad_(False)
        expected = gradients(model, language_loss(model, ids))
        get_razor_model(model, COMPACT)
        assert cosine(gradients(model, language_loss(model, ids)), expected) > 0.99
        saved = measure_saved_bytes(model, input_ids=ids, labels=ids).by_module
        assert "model.layers.0" not in saved
        assert "model.layers.2" in saved

    def test_lora(self) -> None:
        lora = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1, init_lora_weights=False)
        model, ids = get_peft_model(llama(), lora), tokens()
        expected = gradients(model, language_loss(model, ids))
        get_razor_model(model, EXACT)
        assert_close(gradients(model, language_loss(model, ids)), expected)
        compact = get_peft_model(llama(), lora)
        compact.load_state_dict(model.state_dict())
        get_razor_model(compact, COMPACT)
        assert cosine(gradients(compact, language_loss(compact, ids)), expected) > 0.99

    def test_a_checkpoint_around_the_blocks(self) -> None:
        model, ids = llama(), tokens()
        weights = torch.randn(2, 16, 64)

        def run(embedded: Tensor) -> Tensor:
            return (model.model(inputs_embeds=embedded).last_hidden_state * weights).sum()

        def around() -> Tensor:
            return checkpoint(run, model.model.embed_tokens(ids), use_reentrant=False)

        expected = gradients(model, lambda: run(model.model.embed_tokens(ids)))
        get_razor_model(model, EXACT)
        assert_close(gradients(model, around), expected)
        get_razor_model(model.remove_razor(), COMPACT)
        assert cosine(gradients(model, around), expected) > 0.99


class TestMemory:
    def test_blocks_keep_their_input_in_a_few_bits(self) -> None:
        model, ids = get_razor_model(llama(6, hidden_size=128), COMPACT), tokens(4, 32)
        saved = measure_saved_bytes(model, input_ids=ids, labels=ids).by_module
        numel = ids.numel() * 128
        for layer in range(1, 6):
            # 4 bits, two exact elements a row, and a scale.
            assert saved[f"model.layers.{layer}"] <= numel * 4.6 / 8
        assert not any("self_attn" in name or "mlp" in name for name in saved)

    def test_hooks_see_what_is_kept_and_may_move_it(self) -> None:
        model, ids = get_razor_model(llama(), COMPACT), tokens()
        expected = gradients(model, language_loss(model, ids))
        seen = []

        def pack(x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            assert_close(gradients(model, language_loss(model, ids)), expected)
        assert seen.count(torch.uint8) >= 4
        with save_on_cpu():
            assert_close(gradients(model, language_loss(model, ids)), expected)

    def test_codes_go_as_backward_does(self) -> None:
        model, ids = get_razor_model(llama(), COMPACT), tokens()
        loss = language_loss(model, ids)()
        (stream,) = model.model.layers[0].razor_stack.streams
        assert len(stream) == 4
        alive = ref(stream)
        del stream
        left: list[int] = []
        for layer in model.model.layers:
            layer.input_layernorm.weight.register_post_accumulate_grad_hook(
                lambda _: left.append(sum(each() is not None for each in alive()._inputs))
            )
        loss.backward()
        assert left == sorted(left, reverse=True)
        assert left[-1] < left[0]
        del loss
        assert alive() is None

    def test_a_stream_that_is_not_gone_on_with_keeps_no_sum(self) -> None:
        # A block whose input has nothing in common with the last begins another one.
        model, ids = llama(), tokens()
        model.model.layers[1].register_forward_pre_hook(lambda _, args: (-3 * args[0], *args[1:]))
        expected = gradients(model, language_loss(model, ids))
        get_razor_model(model, COMPACT)
        loss = language_loss(model, ids)()
        assert model.model.layers[1].razor_follows is False
        streams = list(model.model.layers[0].razor_stack.streams)
        assert [stream.sum_bytes for stream in streams] == [0, 0]
        del loss, streams
        assert cosine(gradients(model, language_loss(model, ids)), expected) > 0.99

    def test_masks_are_packed_once(self) -> None:
        model, ids = llama(6), tokens(4, 64)
        padding = torch.ones_like(ids)
        padding[0, 50:] = 0
        get_razor_model(model, COMPACT)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": padding}
        plain = measure_saved_bytes(model, input_ids=ids, labels=ids).total
        saved = measure_saved_bytes(model, **batch).total
        assert saved - plain < 4 * 64 * 64  # a byte an element would be more, and six blocks have it

    def test_the_report_counts_a_sum_that_no_last_block_ended(self) -> None:
        model, ids = llama(), tokens()
        get_razor_model(model, RazorConfig.preset("compact"))
        model.model.layers[3].requires_grad_(False)
        whole = measure_saved_bytes(model, input_ids=ids, labels=ids).total
        last = model.model.layers[3]
        last.razor_enabled = False
        assert measure_saved_bytes(model, input_ids=ids, labels=ids).total > whole


class TestWhatUsersDo:
    def test_trainers_checkpointing_is_taken_over(self, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
        rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
        weights = {}
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = get_razor_model(llama(), COMPACT)
            arguments = TrainingArguments(
                str(tmp_path),
                max_steps=2,
                report_to=[],
                use_cpu=True,
                gradient_checkpointing=checkpointing,
                save_strategy="no",
            )
            runs = []
            model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
            Trainer(model, arguments, train_dataset=rows).train()
            assert len(runs) == 4  # twice a step
            weights[checkpointing] = copy.deepcopy(model.remove_razor().state_dict())
        for name, weight in weights[False].items():
            assert torch.equal(weight, weights[True][name])

    def test_checkpointing_that_was_on_before_is_taken_over_and_given_back(self) -> None:
        model, ids = llama(), tokens()
        checkpoint_activations(model)
        get_razor_model(model, COMPACT)
        assert not model.model.layers[0].gradient_checkpointing
        runs: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        language_loss(model, ids)().backward()
        assert len(runs) == 2
        assert model.remove_razor().model.layers[0].gradient_checkpointing

    def test_a_cache_is_not_filled_twice(self) -> None:
        model, ids = llama(use_cache=True), tokens()
        expected = gradients(model, language_loss(model, ids))
        get_razor_model(model, EXACT)
        assert_close(gradients(model, language_loss(model, ids)), expected)

    def test_a_cache_with_something_in_it_is_read(self) -> None:
        # As with prefix tuning; checkpointing of Transformers would leave the prefix out.
        model, ids = llama(use_cache=True), tokens()
        with torch.no_grad():
            prefix = model(input_ids=tokens(2, 5)).past_key_values

        def loss() -> Tensor:
            return model(input_ids=ids, labels=ids, past_key_values=copy.deepcopy(prefix)).loss

        assert isinstance(prefix, DynamicCache)
        expected = gradients(model, loss)
        assert_close(gradients(get_razor_model(model, EXACT), loss), expected)

    def test_copies_and_pickles_have_streams_of_their_own(self) -> None:
        model, ids = get_razor_model(llama(), COMPACT), tokens()
        expected = gradients(model, language_loss(model, ids))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            stacks = {layer.razor_stack for layer in other.model.layers}
            assert len(stacks) == 1
            assert stacks.isdisjoint({model.model.layers[0].razor_stack})
            assert_close(gradients(other, language_loss(other, ids)), expected)

    def test_dense_inside_of_disable_razor(self) -> None:
        model, ids = llama(), tokens()
        dense = measure_saved_bytes(model, input_ids=ids, labels=ids).total
        get_razor_model(model, COMPACT)
        with model.disable_razor():
            assert measure_saved_bytes(model, input_ids=ids, labels=ids).total == dense
        report = model.memory_report(input_ids=ids, labels=ids)
        assert report.dense_bytes == dense
        assert report.by_kind["block"][1] > 0

    def test_some_layers_are_left_to_operators(self) -> None:
        config = RazorConfig.preset("compact", exclude_modules=["layers.0", "layers.1"])
        model, ids = get_razor_model(llama(), config), tokens()
        kinds = {name: module.kind for name, module in model.razor_modules()}
        assert kinds["model.layers.2"] == "block"
        assert kinds["model.layers.0.mlp.up_proj"] == "linear"
        assert "model.layers.2.mlp.up_proj" not in kinds
        razor = gradients(model, language_loss(model, ids))
        assert cosine(razor, gradients(model.remove_razor(), language_loss(model, ids))) > 0.98

    def test_bits_by_layer(self) -> None:
        config = RazorConfig.preset("compact", overrides={r"layers\.[01]": {"stream_bits": 8}})
        model, ids = get_razor_model(llama(), config), tokens()
        saved = measure_saved_bytes(model, input_ids=ids, labels=ids).by_module
        assert saved["model.layers.1"] > 1.6 * saved["model.layers.2"]

    def test_what_a_device_map_leaves_on_blocks(self) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        model, ids = llama(), tokens()
        expected = gradients(model, language_loss(model, ids))
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_razor_model(model, COMPACT)
        assert cosine(gradients(model, language_loss(model, ids)), expected) > 0.99
        assert "model.layers.1" in measure_saved_bytes(model, input_ids=ids, labels=ids).by_module
        model.remove_razor()
        for module in model.modules():
            remove_hook_from_module(module)
        assert_close(gradients(model, language_loss(model, ids)), expected)


class TestConfig:
    def test_models_without_known_blocks_are_an_error_that_says_what_to_do(self) -> None:
        with pytest.raises(ValueError, match="recompute_modules"):
            get_razor_model(nn.Sequential(nn.Linear(4, 4)), COMPACT)

    def test_names_that_match_nothing_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="recompute_modules entry 'Bottlenek'"):
            get_razor_model(ResNet(), RazorConfig.preset("compact", recompute_modules=["Bottleneck", "Bottlenek"]))

    def test_blocks_without_recomputation_are_an_error(self) -> None:
        with pytest.raises(ValueError, match='recompute="none"'):
            RazorConfig(recompute_modules=["Bottleneck"])

    @pytest.mark.parametrize("change", [{"recompute": "layers"}, {"stream_bits": 5}, {"recompute_modules": []}])
    def test_illegal_values(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(change))):
            RazorConfig(**change)
