"""What a user does with the Hub, one thing after the other; prints what came of each as JSON.

A process of its own, as `huggingface_hub` reads its address once, when it is imported. Run by test_hub.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import make
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_backrazor import (
    AutoRazorModel,
    AutoRazorModelForSequenceClassification,
    RazorCallback,
    RazorConfig,
    get_razor_model,
)

SETTINGS = RazorConfig(activation_bits=3, overrides={"dense": {"sparsity": 0.5}})


def same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    found, expected = found.state_dict(), expected.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def same_settings(found: RazorConfig) -> bool:
    return (found.activation_bits, found.overrides) == (SETTINGS.activation_bits, SETTINGS.overrides)


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folder: Path) -> dict[str, Any]:
    model, batch = make("bert")
    model = get_razor_model(model, SETTINGS)
    model.memory_report(**batch)
    facts: dict[str, Any] = {}

    model.push_to_hub("someone/model")
    first = HfApi().model_info("someone/model").sha
    loaded = AutoRazorModel.from_pretrained("someone/model")
    facts["loads by architectures"] = type(loaded).__name__ == type(model).__name__ and same_weights(loaded, model)
    facts["settings arrive"] = same_settings(loaded.razor_config)
    task = AutoRazorModelForSequenceClassification.from_pretrained("someone/model", num_labels=2)
    facts["loads by task"] = same_weights(task, model)
    plain = AutoModelForSequenceClassification.from_pretrained("someone/model")
    facts["loads without razor"] = same_weights(plain, model) and not hasattr(plain, "razor_config")
    given = AutoRazorModel.from_pretrained("someone/model", razor_config=RazorConfig.preset("paper"))
    facts["settings can be given"] = given.razor_config.sparsity

    with torch.no_grad():
        model.classifier.weight.zero_()
    model.push_to_hub("someone/model", commit_message="zeroed")
    older = AutoRazorModel.from_pretrained("someone/model", revision=first)
    facts["revisions"] = same_weights(older, loaded) and not same_weights(older, model)

    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="someone/saved")
    facts["save_pretrained pushes"] = same_weights(AutoRazorModel.from_pretrained("someone/saved"), model)

    RazorConfig(qkv_bits=8, base_model_name_or_path="someone/model").push_to_hub("someone/settings")
    from_settings = AutoRazorModel.from_pretrained("someone/settings")
    facts["settings alone name a base model"] = same_weights(from_settings, model)
    facts["their settings hold"] = from_settings.razor_config.qkv_bits
    facts["config round trip"] = RazorConfig.from_pretrained("someone/settings").qkv_bits

    base = AutoModelForSequenceClassification.from_pretrained("someone/model")
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    get_razor_model(adapted, SETTINGS).push_to_hub("someone/adapter")
    again = AutoRazorModelForSequenceClassification.from_pretrained("someone/adapter")
    facts["adapters"] = same_weights(again, adapted) and same_settings(again.razor_config)
    facts["adapters train on"] = any("lora" in name for name, p in again.named_parameters() if p.requires_grad)

    arguments = TrainingArguments(
        folder / "trained", max_steps=1, report_to=[], use_cpu=True, push_to_hub=True, hub_model_id="someone/trained"
    )
    row = {name: tensor[0] for name, tensor in batch.items()}
    trainer = Trainer(model, arguments, train_dataset=[row, row], callbacks=[RazorCallback()])
    trainer.train()
    trainer.push_to_hub()
    facts["Trainer pushes"] = same_weights(AutoRazorModel.from_pretrained("someone/trained"), model)
    model.create_or_update_model_card(folder / "trained", metrics={"accuracy": 0.75}, repo_id="someone/trained")
    facts["Trainer's card with the section"] = (folder / "trained" / "README.md").read_text()

    load = AutoRazorModel.from_pretrained
    facts["error: no such repository"] = error_of(load, "someone/nothing")
    facts["error: pickles"] = error_of(load, "someone/model", use_safetensors=False)
    HfApi().create_repo("someone/pickled")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for file in (
        folder / "saved" / "config.json",
        folder / "saved" / "razor_config.json",
        folder / "pytorch_model.bin",
    ):
        HfApi().upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id="someone/pickled")
    facts["error: only a pickle there"] = error_of(load, "someone/pickled")
    HfApi().create_repo("someone/without")
    facts["error: no settings there"] = error_of(load, "someone/without")
    return facts


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(main(Path(sys.argv[1]))))
