"""Libraries that people use beside Transformers: models of timm and diffusers, trainers of Lightning and
sentence-transformers.

Each model is small, with random weights. MiB saved by one training forward, dense and with `balanced`, and the cosine
of all gradients with the dense ones, as measured with the versions in `constraints.txt` and timm 1.0.31:

| library | model | dense | balanced | factor | cosine |
|---|---|---|---|---|---|
| timm | vit | 9.57 | 0.62 | 15.4 | 0.9878 |
| timm | swin | 13.73 | 0.95 | 14.4 | 0.9966 |
| timm | efficientnet | 51.98 | 4.94 | 10.5 | 0.9783 |
| timm | mobilenet_v3 | 28.84 | 2.97 | 9.7 | 0.9720 |
| timm | convnext | 3.82 | 0.44 | 8.7 | 0.9907 |
| diffusers | unet | 10.41 | 0.78 | 13.4 | 0.9957 |
| diffusers | dit | 3.39 | 0.14 | 24.8 | 0.9996 |
| diffusers | flux | 7.55 | 0.54 | 13.9 | 0.9991 |
| diffusers | sd3 | 6.36 | 0.11 | 57.5 | 0.9991 |
| diffusers, LoRA | unet | 13.55 | 0.73 | 18.5 | 0.9947 |
| diffusers, LoRA | dit | 4.72 | 0.10 | 45.2 | 0.9999 |
| diffusers, LoRA | flux | 10.02 | 0.63 | 15.9 | 0.9998 |
| diffusers, LoRA | sd3 | 8.18 | 0.16 | 51.1 | 0.9999 |
| Lightning | Llama | 4.02 | 0.28 | 14.6 | 0.9950 |
| sentence-transformers | BERT, 12 texts | 4.13 | 0.32 | 12.8 | 0.9998 |
| sentence-transformers | BERT, cached loss, 6 texts at a time | 2.07 | 0.17 | 12.2 | 0.9998 |

Batch norms of random weights on few pixels lower the cosine of EfficientNet and MobileNetV3.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_backrazor import RazorConfig, get_razor_model, measure_saved_bytes
from hf_backrazor.model import RazorModel

FACTOR = 6.0
COSINE = 0.95

Subject = tuple[nn.Module, dict[str, Any]]


def library(name: str) -> Any:
    """The module of this name; skips the test where it cannot be imported.

    Beside a torch for CPUs, the torchvision on PyPI, which is built for CUDA, raises RuntimeError; timm imports it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step in training mode, always with the same random numbers."""
    model.train().zero_grad()
    torch.manual_seed(1)
    loss = model(**batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients up to the order of summation."""
    assert found.keys() == expected.keys()
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-5 * whole, name


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    one, other = (torch.cat([grads[name].double().flatten() for name in expected]) for grads in (found, expected))
    return F.cosine_similarity(one, other, dim=0).item()


def check(model: nn.Module, batch: dict[str, Any], rate: float = 1e-3) -> nn.Module:
    """Compare razor with the dense model `model`, a module that returns its loss; returns one that was trained."""
    for name, parameter in model.named_parameters():
        if not parameter.any():  # gates that begin closed would leave most gradients zero
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.02)
    loss, expected = gradients(model, batch)
    assert all(grad.isfinite().all() for grad in expected.values())
    dense = measure_saved_bytes(model, **batch).total

    lossless = get_razor_model(copy.deepcopy(model), RazorConfig.preset("lossless"))
    found_loss, found = gradients(lossless, batch)
    assert torch.equal(found_loss, loss)
    assert_close(found, expected)

    razor = get_razor_model(copy.deepcopy(model), RazorConfig.preset("balanced"))
    found_loss, found = gradients(razor, batch)
    assert torch.equal(found_loss, loss)
    assert cosine(found, expected) > COSINE
    assert measure_saved_bytes(razor, **batch).total < dense / FACTOR

    optimizer = torch.optim.AdamW([p for p in razor.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(3):
        found_loss, _ = gradients(razor, batch)
        optimizer.step()
        losses.append(found_loss.item())
    assert losses[-1] < losses[0]
    return razor


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# timm


class Classifier(nn.Module):
    """A model of timm, and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)


# Name of the model, pixels to a side, images, and what makes it small.
TIMM = {
    "vit": ("vit_tiny_patch16_224", 64, 8, {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}),
    "swin": ("swin_tiny_patch4_window7_224", 64, 8, {"window_size": 4, "embed_dim": 32, "depths": (2, 2)}),
    "efficientnet": ("tinynet_e", 96, 8, {}),
    "mobilenet_v3": ("mobilenetv3_small_050", 96, 16, {}),
    "convnext": ("convnext_atto", 64, 8, {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind: str) -> None:
    timm = library("timm")
    name, size, images, others = TIMM[kind]
    if kind in ("vit", "swin"):
        others = {"img_size": size, **others}
    if kind == "swin":
        others = {"num_heads": (2, 4), **others}
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1, **others)
    check(Classifier(model), {"images": noise(images, 3, size, size), "labels": torch.arange(images) % 10})


# diffusers


class Denoiser(nn.Module):
    """A model of diffusers, and the loss that it is trained with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, target: Tensor, **inputs: Any) -> Tensor:
        (found,) = self.model(**inputs, return_dict=False)
        return F.mse_loss(found, target)


def unet(diffusers: Any) -> Subject:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        dropout=0.1,
    )
    images = {"sample": noise(2, 4, 16, 16), "target": noise(2, 4, 16, 16) + 0.1}
    return model, images | {"timestep": torch.tensor([1, 400]), "encoder_hidden_states": noise(2, 12, 32)}


def dit(diffusers: Any) -> Subject:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        num_embeds_ada_norm=1000,
        dropout=0.1,
    )
    images = {"hidden_states": noise(4, 4, 16, 16), "target": noise(4, 4, 16, 16) + 0.1}
    return model, images | {"timestep": torch.tensor([1, 50, 400, 900]), "class_labels": torch.arange(4)}


def flux(diffusers: Any) -> Subject:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    text = {"encoder_hidden_states": noise(4, 16, 32), "pooled_projections": noise(4, 32)}
    ids = {"img_ids": places, "txt_ids": torch.zeros(16, 3)}
    images = {"hidden_states": noise(4, 64, 16), "target": noise(4, 64, 16) + 0.1}
    return model, images | text | ids | {"timestep": torch.tensor([0.1, 0.3, 0.5, 0.9])}


def sd3(diffusers: Any) -> Subject:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    text = {"encoder_hidden_states": noise(4, 12, 32), "pooled_projections": noise(4, 32)}
    images = {"hidden_states": noise(4, 4, 16, 16), "target": noise(4, 4, 16, 16) + 0.1}
    return model, images | text | {"timestep": torch.tensor([1.0, 50.0, 400.0, 900.0])}


DIFFUSERS: dict[str, Callable[[Any], Subject]] = {"unet": unet, "dit": dit, "flux": flux, "sd3": sd3}


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_diffusers(kind: str) -> None:
    model, batch = DIFFUSERS[kind](library("diffusers"))
    check(Denoiser(model), batch)


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_diffusers_with_lora(kind: str) -> None:
    model, batch = DIFFUSERS[kind](library("diffusers"))
    peft = library("peft")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "linear", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]
    lora = peft.LoraConfig(r=4, target_modules=layers, lora_dropout=0.1)
    if hasattr(model, "add_adapter"):
        model.requires_grad_(False)
        model.add_adapter(lora)
    else:
        model = peft.get_peft_model(model, lora)
    trained = check(Denoiser(model), batch, rate=1e-2)
    assert all("lora" in name for name, parameter in trained.named_parameters() if parameter.grad is not None)


# Lightning


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=96, num_hidden_layers=3, attention_dropout=0.1, use_cache=False)
    return LlamaForCausalLM(config)


def lightning_module() -> nn.Module:
    """A LightningModule around a small Llama, that keeps its losses."""
    lightning = library("lightning")

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = llama(), []

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, labels=input_ids).loss

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = self(batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Training()


def fit(module: nn.Module, tokens: Tensor, directory: Path) -> None:
    trainer = library("lightning").Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=directory,
    )
    torch.manual_seed(2)
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=4))


@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("inner", [False, True], ids=["the LightningModule", "the model in it"])
def test_lightning(inner: bool, tmp_path: Path) -> None:
    tokens = torch.randint(96, (16, 48), generator=torch.Generator().manual_seed(3))
    trained, grads = {}, {}
    for preset in ("dense", "lossless", "balanced"):
        module = lightning_module()
        if preset != "dense":
            prepared = get_razor_model(module.model if inner else module, RazorConfig.preset(preset))
            assert isinstance(prepared, RazorModel)
        _, grads[preset] = gradients(module, {"input_ids": tokens[:4]})
        fit(module, tokens, tmp_path)
        trained[preset] = module
    assert_close(grads["lossless"], grads["dense"])
    assert cosine(grads["balanced"], grads["dense"]) > COSINE
    dense, lossless, balanced = trained.values()
    assert len(dense.losses) == 8
    assert lossless.losses == pytest.approx(dense.losses, rel=1e-4)
    # The tiled loss of a language model is equal up to the order of summation.
    assert balanced.losses[0] == pytest.approx(dense.losses[0], rel=1e-6)
    assert balanced.losses == pytest.approx(dense.losses, rel=0.01)
    assert balanced.losses[-1] < balanced.losses[0]
    saved = [measure_saved_bytes(module, input_ids=tokens[:4]).total for module in (dense, balanced)]
    assert saved[1] < saved[0] / FACTOR


# sentence-transformers

WORDS = [f"{letter}{number}" for letter in "abcdefgh" for number in range(30)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random BERT and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    path = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
    BertModel(BertConfig(**sizes, vocab_size=len(special + WORDS))).save_pretrained(path)
    return path


def sentence(seed: int, length: int) -> str:
    picked = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in picked)


@pytest.mark.parametrize("cached", [False, True], ids=["MultipleNegativesRankingLoss", "CachedMultipleNegatives"])
def test_sentence_transformers(cached: bool, encoder: Path, tmp_path: Path) -> None:
    library("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    texts = [(sentence(seed, 24), sentence(seed, 20)) for seed in range(24)]
    settings = {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 12, "logging_steps": 1}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), **settings, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    losses, values, grads, saved = {}, {}, {}, {}
    for preset in ("dense", "lossless", "balanced"):
        model = SentenceTransformer(str(encoder), device="cpu")
        if preset != "dense":
            get_razor_model(model, RazorConfig.preset(preset))
        loss = MultipleNegativesRankingLoss(model)
        if cached:
            loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=6)
        columns = [model.tokenize(list(column)) for column in zip(*texts[:12], strict=True)]
        # The loss that caches embeds twice, and saves for one mini-batch at a time.
        values[preset], grads[preset] = gradients(loss, {"sentence_features": copy.deepcopy(columns), "labels": None})
        part = {name: value[:6] if cached else value for name, value in columns[0].items()}
        saved[preset] = measure_saved_bytes(model, input=part).total
        trainer = SentenceTransformerTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict(dict(zip(("anchor", "positive"), zip(*texts, strict=True), strict=True))),
            loss=loss,
        )
        trainer.train()
        losses[preset] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses["dense"]) == 4
    assert losses["lossless"] == pytest.approx(losses["dense"], rel=1e-4)
    assert torch.equal(values["lossless"], values["dense"])
    assert torch.equal(values["balanced"], values["dense"])
    assert losses["balanced"] == pytest.approx(losses["dense"], rel=0.1)
    assert losses["balanced"][-1] < losses["balanced"][0]
    assert_close(grads["lossless"], grads["dense"])
    assert cosine(grads["balanced"], grads["dense"]) > COSINE
    assert saved["balanced"] < saved["dense"] / FACTOR
