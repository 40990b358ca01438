"""The rest of the ecosystem with a razor model: Trainer, generate, pipelines, copies, autocast. No special cases."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LENGTH, VOCABULARY, Batch, make
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from hf_backrazor import RazorCallback, RazorConfig, RazorModel, get_razor_model
from hf_backrazor.config import RAZOR_CONFIG_NAME
from hf_backrazor.modules import RazorModule

NAMES = ["bert", "gpt2", "vit"]
AUTO = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "vit": AutoModelForImageClassification,
}
# Its name in newer versions of Transformers, where the old one warns.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {item.name for item in dataclasses.fields(TrainingArguments)}
)


class Toy(Dataset):
    """Rows that a tiny model learns in a few steps."""

    def __init__(self, name: str, rows: int = 48, surplus: bool = False) -> None:
        random = torch.Generator().manual_seed(5)
        labels = torch.randint(2, (rows,), generator=random)
        if name == "vit":
            images = torch.randn(rows, 3, 32, 32, generator=random)
            self.columns = {"pixel_values": images + 2.0 * labels.view(-1, 1, 1, 1) - 1.0, "labels": labels}
        elif name == "bert":
            tokens = torch.randint(4, VOCABULARY, (rows, LENGTH), generator=random)
            tokens[:, 1:4] = labels[:, None] + 2
            self.columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        else:
            start = torch.randint(2, 30, (rows, 1), generator=random)
            tokens = start + torch.arange(LENGTH)  # counting
            self.columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        if surplus:
            self.columns["surplus"] = torch.arange(rows)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: column[index] for key, column in self.columns.items()}


def fresh(name: str, config: RazorConfig | None = None, dropout: float | None = None) -> PreTrainedModel:
    """A model with the same weights each time; razor if a config is given."""
    torch.manual_seed(11)
    model, _ = make(name)
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    return model if config is None else get_razor_model(model, config)


def trainer_of(model: nn.Module, folder: Path, data: Dataset, **changes: Any) -> Trainer:
    others = {key: changes.pop(key) for key in ("callbacks", "compute_metrics", "eval_dataset") if key in changes}
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(model, TrainingArguments(str(folder), **{**settings, **changes}), train_dataset=data, **others)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Logits(TrainerCallback):
    """What the model said in each forward pass of training."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if module.training:
                self.values.append(output["logits"].detach().clone())

        model.register_forward_hook(note)


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for key, value in found.state_dict().items():
        assert torch.equal(value, state[key]), key


# Training and evaluation


@pytest.mark.parametrize("preset", ["paper", "balanced", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_training_learns_and_evaluation_works(name: str, preset: str, tmp_path: Path) -> None:
    model = fresh(name, RazorConfig.preset(preset))
    before = copy.deepcopy(model.state_dict())
    data = Toy(name)
    trainer = trainer_of(model, tmp_path, data, max_steps=32, learning_rate=1e-2, eval_dataset=Toy(name, rows=16))
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < 0.75 * first
    history = losses(trainer)
    assert len(history) == 32
    assert sum(history[-4:]) < 0.8 * sum(history[:4])
    assert trainer.model is model
    assert isinstance(model, RazorModel)
    moved = [key for key, p in model.named_parameters() if not torch.equal(p, before[key])]
    # Positions that no row has, and weights the loss does not depend on, get no gradient.
    assert len(moved) > 0.9 * len(list(model.parameters()))
    prediction = trainer.predict(Toy(name, rows=16))
    assert prediction.predictions.shape[0] == 16
    assert prediction.metrics["test_loss"] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_lossless_training_follows_the_dense_run(name: str, tmp_path: Path) -> None:
    runs = {}
    for config in (None, RazorConfig.preset("lossless")):
        model, logits = fresh(name, config, dropout=0.1), Logits()
        trainer = trainer_of(
            model,
            tmp_path,
            Toy(name),
            max_steps=6,
            learning_rate=1e-3,
            optim="sgd",
            max_grad_norm=0.0,
            callbacks=[logits],
        )
        trainer.train()
        runs[config is None] = losses(trainer), logits.values, model
    assert torch.equal(runs[True][1][0], runs[False][1][0])  # dropout drew the same mask
    assert len(set(runs[True][0])) == 6
    assert runs[False][0] == pytest.approx(runs[True][0], abs=1e-5)
    for (key, dense), razor in zip(runs[True][2].named_parameters(), runs[False][2].parameters(), strict=True):
        torch.testing.assert_close(razor, dense, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("granularity", ["row", "sample"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])  # BERT takes the sum over steps for the mean, razor or not
def test_gradient_accumulation_equals_the_large_batch(name: str, granularity: str, tmp_path: Path) -> None:
    """In double precision, where rounding does not flip what top-k keeps."""

    class Double(Toy):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {k: v.double() if v.is_floating_point() else v for k, v in super().__getitem__(index).items()}

    models = {}
    for batch, steps in ((8, 1), (2, 4)):
        model = fresh(name, RazorConfig(granularity=granularity), dropout=0.0).double()
        trainer = trainer_of(
            model,
            tmp_path,
            Double(name),
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        models[batch] = model
    start = fresh(name).double()
    for key, value in models[8].named_parameters():
        torch.testing.assert_close(models[2].get_parameter(key), value, rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(value, start.get_parameter(key)) for key, value in models[8].named_parameters())


@pytest.mark.filterwarnings("ignore:activation checkpointing is on")
@pytest.mark.parametrize("config", [RazorConfig(), RazorConfig.preset("paper")], ids=["balanced", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_gives_the_same_run(name: str, config: RazorConfig, tmp_path: Path) -> None:
    """What is packed in the recomputation is what was packed without: dropout is replayed, no copy is stale."""
    models, histories = [], []
    for on in (False, True):
        model = fresh(name, config, dropout=0.1)
        trainer = trainer_of(model, tmp_path, Toy(name), max_steps=4, **{CHECKPOINTING: on})
        trainer.train()
        assert on == any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        models.append(model)
        histories.append(losses(trainer))
    assert histories[0] == histories[1]
    for (key, value), checkpointed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(checkpointed, value, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_warns_once(name: str, tmp_path: Path) -> None:
    def notices(on: bool) -> list[str]:
        trainer = trainer_of(fresh(name, RazorConfig()), tmp_path, Toy(name), max_steps=3, **{CHECKPOINTING: on})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        return [str(w.message) for w in caught if "gains little" in str(w.message)]

    assert notices(on=False) == []
    assert len(notices(on=True)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_bf16_on_a_cpu(name: str, tmp_path: Path) -> None:
    runs = {}
    configs = {"dense": None, "lossless": RazorConfig.preset("lossless"), "balanced": RazorConfig()}
    for label, config in configs.items():
        trainer = trainer_of(fresh(name, config), tmp_path, Toy(name), max_steps=24, learning_rate=1e-2, bf16=True)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        runs[label] = losses(trainer)
    # GPT-2 sums its loss in another order.
    assert runs["lossless"][0] == runs["balanced"][0] == pytest.approx(runs["dense"][0], rel=1e-6)
    assert runs["lossless"][:6] == pytest.approx(runs["dense"][:6], rel=0.02)
    assert sum(runs["balanced"][-4:]) < 0.8 * sum(runs["balanced"][:4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_torch_compile(name: str, tmp_path: Path) -> None:
    """The same losses and, up to rounding, weights; with no break of the graph at razor modules."""
    runs = {}
    for compiled in (False, True):
        model = fresh(name, RazorConfig(), dropout=0.0)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_of(model, tmp_path / str(compiled), Toy(name), callbacks=[RazorCallback()], **options)
        trainer.train()
        runs[compiled] = trainer
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not [reason for reason in breaks if "razor" in reason]
    assert losses(runs[True]) == pytest.approx(losses(runs[False]), rel=1e-4)
    expected = runs[False].model.state_dict()
    for key, value in runs[True].model.state_dict().items():
        # A row of activations at a bound between two scales takes the other one by a rounding, which AdamW makes larger
        # where a gradient is all but zero: single elements may be further off.
        assert (value - expected[key]).norm() < 1e-3 * expected[key].norm() + 1e-5, key
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
    trainer.save_model(tmp_path / "saved")
    assert_same_weights(AUTO[name].from_pretrained(tmp_path / "saved"), model)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_label_smoothing(name: str, tmp_path: Path) -> None:
    """Trainer decides by the model's class name whether labels are shifted."""
    runs = []
    for config, smoothing in ((None, 0.2), (RazorConfig.preset("lossless"), 0.2), (None, 0.0)):
        trainer = trainer_of(
            fresh(name, config), tmp_path, Toy(name), max_steps=4, label_smoothing_factor=smoothing, optim="sgd"
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1][0] == runs[0][0]
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)
    assert runs[2][0] != runs[0][0]


# What Trainer decides by looking at the model


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "t5", "gemma"])
def test_weight_decay_groups_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    def groups(model: nn.Module) -> tuple[list[str], dict[float, set[str]]]:
        trainer = trainer_of(model, tmp_path, Toy("bert"), weight_decay=0.1)
        names = {id(p): key for key, p in model.named_parameters()}
        optimizer = trainer.create_optimizer()
        return trainer.get_decay_parameter_names(model), {
            group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
        }

    decayed, by_decay = groups(fresh(name))
    razor = fresh(name, RazorConfig())
    assert groups(razor) == (decayed, by_decay)
    kinds: dict[str, set[str]] = {}
    for module_name, module in razor.razor_modules():
        kinds.setdefault(module.kind, set()).update(f"{module_name}.{key}" for key, _ in module.named_parameters())
    assert {key for key in kinds["linear"] if key.endswith(".weight")} <= set(decayed)
    assert not any(key.endswith(".bias") for key in decayed)
    if name not in ("t5", "gemma"):  # Trainer knows T5's layer_norm and Gemma's only by name
        assert not kinds["norm"] & set(decayed)
        assert by_decay[0.0] >= kinds["norm"]


@pytest.mark.parametrize("name", NAMES)
def test_unused_columns_are_removed(name: str, tmp_path: Path) -> None:
    def passed(model: nn.Module, remove: bool = True) -> set[str]:
        seen: set[str] = set()
        hook = model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
        data = Toy(name, surplus=True)
        trainer = trainer_of(model, tmp_path, data, max_steps=1, remove_unused_columns=remove)
        columns = trainer._signature_columns
        assert columns is None
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("surplus" in batch) != remove
        if remove:
            trainer.train()
            columns = trainer._signature_columns
            assert "labels" in columns
            assert "surplus" not in columns
            seen.update(f"column {column}" for column in columns)
        hook.remove()
        return seen

    razor = fresh(name, RazorConfig())
    assert passed(razor) == passed(fresh(name))
    passed(razor, remove=False)


def test_columns_of_a_datasets_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {key: column.tolist() for key, column in Toy("bert").columns.items()}
    data = datasets.Dataset.from_dict({**columns, "text": [f"row {i}" for i in range(48)]})
    trainer = trainer_of(fresh("bert", RazorConfig()), tmp_path, data, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2


# Checkpoints


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_the_dense_ones_and_one_file_more(name: str, tmp_path: Path) -> None:
    module = {"bert": "query", "gpt2": "c_fc", "vit": "fc1"}[name]
    config = RazorConfig(sparsity=0.95, overrides={rf"0\..*{module}": {"residual_bits": 2}, module: {"sparsity": 0.5}})
    models = {"dense": fresh(name), "razor": fresh(name, config)}
    for label, model in models.items():
        trainer_of(model, tmp_path / label, Toy(name), max_steps=2, save_strategy="steps", save_steps=2).train()
    dense, razor = (tmp_path / label / "checkpoint-2" for label in models)

    assert {path.name for path in razor.iterdir()} == {path.name for path in dense.iterdir()} | {RAZOR_CONFIG_NAME}
    assert (razor / "model.safetensors").exists()
    text = (razor / "config.json").read_text()
    assert text == (dense / "config.json").read_text()
    assert "razor" not in text.lower()
    assert json.loads(text)["architectures"] == [ARCHITECTURES[name][0].__name__]
    assert RazorConfig.from_pretrained(razor) == models["razor"].razor_config == config
    assert len({module_config.residual_bits for _, module_config in kinds_of(models["razor"])}) == 2

    loaded, report = AUTO[name].from_pretrained(razor, output_loading_info=True)
    assert type(loaded) is ARCHITECTURES[name][0]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not any(isinstance(module, RazorModule) for module in loaded.modules())
    assert_same_weights(loaded, models["razor"])
    again = get_razor_model(loaded, RazorConfig.from_pretrained(razor))
    assert dict(kinds_of(again)) == dict(kinds_of(models["razor"]))


def kinds_of(model: RazorModel) -> Iterable[tuple[str, RazorConfig]]:
    """Names and settings of the modules, without where the model came from."""
    for name, module in model.razor_modules():
        yield name, dataclasses.replace(module.razor_config, base_model_name_or_path=None)


# Not ViT: Trainer cannot load its checkpoints back, razor or not, as they are saved under other keys.
RESUMABLE = ["bert", "gpt2", "llama"]


@pytest.mark.parametrize("preset", ["balanced", "fast"])
@pytest.mark.parametrize("name", RESUMABLE)
def test_resuming_gives_the_weights_of_the_uninterrupted_run(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `fast` rounds at random wherever the processor multiplies integers fast; this one shall.
    monkeypatch.setattr("hf_backrazor.packing.integers.has_integer_products", lambda: True)

    def run(folder: str, resume: Path | None = None) -> RazorModel:
        model = fresh(name, RazorConfig.preset(preset), dropout=0.1)
        trainer = trainer_of(model, tmp_path / folder, Toy(name), max_steps=8, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        assert trainer.state.global_step == 8
        return model

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "checkpoint-3")
    assert isinstance(resumed, RazorModel)
    assert_same_weights(resumed, whole)
    with pytest.raises(AssertionError):  # the check sees a difference: these are the weights three steps in
        assert_same_weights(AUTO[name].from_pretrained(tmp_path / "whole" / "checkpoint-3"), whole)


@pytest.mark.parametrize("name", RESUMABLE)
def test_the_best_model_is_loaded_at_the_end(name: str, tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0])

    def metric(prediction: EvalPrediction) -> dict[str, float]:
        return {"score": next(scores)}

    model = fresh(name, RazorConfig())
    trainer = trainer_of(
        model,
        tmp_path,
        Toy(name),
        eval_dataset=Toy(name, rows=8),
        compute_metrics=metric,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert isinstance(model, RazorModel)
    assert_same_weights(model, AUTO[name].from_pretrained(tmp_path / "checkpoint-4"))
    with pytest.raises(AssertionError):
        assert_same_weights(model, AUTO[name].from_pretrained(tmp_path / "checkpoint-6"))


# Inference


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_generate_is_the_plain_models(name: str, way: str, training: bool) -> None:
    """In training mode too, as in reinforcement learning: with dropout on, the same random numbers are drawn."""
    plain, batch = make(name)
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("paper"))
    prompt = {"input_ids": batch["input_ids"][:, :6], "attention_mask": torch.ones(3, 6, dtype=torch.long)}

    def generated(model: PreTrainedModel) -> Tensor:
        model.train(training)
        torch.manual_seed(4)
        return model.generate(
            **prompt, **GENERATION[way], max_new_tokens=8, min_new_tokens=8, pad_token_id=1, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    expected, found = generated(plain), generated(razor)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores) == 8
    for score, expected_score in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(score, expected_score)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(VOCABULARY - 2))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="[UNK]", model_max_length=32
    )


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_pipelines(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def answers(model: PreTrainedModel) -> Any:
        model.eval()
        if name == "bert":
            classify = pipeline("text-classification", model=model, tokenizer=tokenizer())
            return classify(["w1 w2 w3", "w9 w8 w7 w6 w5"], batch_size=2, top_k=2)
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer())
        return generate("w1 w2 w3", max_new_tokens=6, do_sample=False)

    plain, _ = make(name)
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("paper"))
    assert answers(razor) == answers(plain)
    assert isinstance(razor, RazorModel)
    assert "not supported" not in caplog.text  # a pipeline knows models by the names of their classes


# Copies, dtypes, autocast


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one training step with a fixed seed."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama"])
def test_copies(name: str, way: str, when: str) -> None:
    """Before and after the first training step, in which the model is watched."""
    plain, batch = make(name)
    model = get_razor_model(plain, RazorConfig(overrides={r"[^.]*": {"sparsity": 0.9}}))
    if when == "after":
        step(model, batch)
    copied = COPIES[way](model)
    assert type(copied) is type(model)
    assert copied.razor_config == model.razor_config
    assert copied.razor_config is not model.razor_config
    assert dict(kinds_of(copied)) == dict(kinds_of(model))
    assert len(dict(kinds_of(copied))) > 10
    expected_logits, expected = step(model, batch)
    logits, gradients = step(copied, batch)
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[key], expected[key]) for key in expected)

    plain_type = ARCHITECTURES[name][0]
    assert type(copied.remove_razor()) is plain_type
    assert not any(isinstance(module, RazorModule) for module in copied.modules())
    assert isinstance(model, RazorModel)
    assert sum(isinstance(module, RazorModule) for module in model.modules()) > 10
    _, dense = step(copied, batch)
    assert any(not torch.equal(dense[key], expected[key]) for key in expected)  # razor's were its own


def test_a_copy_is_watched_by_itself_and_once() -> None:
    def notices(model: nn.Module) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, batch)
        return sum("gains little" in str(w.message) for w in caught)

    plain, batch = make("bert")
    getattr(plain, f"{CHECKPOINTING}_enable")()
    model = get_razor_model(plain)
    copied = copy.deepcopy(model)
    assert [notices(copied) for _ in range(3)] == [1, 0, 0]
    assert [notices(model) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama"])
def test_half_precision_weights(name: str, dtype: torch.dtype, cast_first: bool) -> None:
    plain, batch = make(name)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    razor = copy.deepcopy(plain)
    for config, fidelity in ((RazorConfig.preset("lossless"), 0.999), (RazorConfig(), 0.8)):
        expected_logits, expected = step(plain.to(dtype), batch)
        razor = get_razor_model(razor.to(dtype), config) if cast_first else get_razor_model(razor, config).to(dtype)
        logits, gradients = step(razor, batch)
        assert logits.dtype == dtype
        assert torch.equal(logits, expected_logits)
        assert cosine(gradients, expected) > fidelity
        razor.remove_razor()


@pytest.mark.parametrize("preset", ["lossless", "paper", "balanced", "fast"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "qwen3", "t5"])
def test_autocast(name: str, preset: str) -> None:
    plain, batch = make(name)
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset(preset))

    def cast_step(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**batch)
        output.loss.backward()  # outside, as is recommended
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        return output.loss.detach(), output.logits.detach(), gradients

    expected_loss, expected_logits, expected = cast_step(plain)
    loss, logits, gradients = cast_step(razor)
    assert logits.dtype == expected_logits.dtype == torch.bfloat16
    assert loss.dtype == expected_loss.dtype
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)  # summed in another order
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert cosine(gradients, expected) > {"lossless": 0.9995, "paper": 0.3}.get(preset, 0.8)
    if preset == "lossless":
        largest = max(gradient.abs().max() for gradient in expected.values())
        for key, gradient in expected.items():
            assert (gradients[key] - gradient).abs().max() < 0.02 * largest, key


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([g[key].flatten().float() for key in expected]) for g in (found, expected)]
    return nn.functional.cosine_similarity(*flat, dim=0).item()
