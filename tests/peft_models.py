"""Small random models in the place of those that PEFT's tests read from the Hub, in a cache of the Hub's client.

    HF_HOME=<folder> python tests/peft_models.py

With the same `HF_HOME` and `HF_HUB_OFFLINE=1`, PEFT's tests (see `peft_suite.py`) find these under the names of the
originals, which have the same architectures, and about the same sizes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_DECODER = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 1024}
_GATED = {**_DECODER, "intermediate_size": 32, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 1000, "n_positions": 512}
_ENCODER = {**_DECODER, "hidden_size": 32, "intermediate_size": 37, "vocab_size": 1124}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
_OPT = {
    **_DECODER, "num_hidden_layers": 5, "ffn_dim": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 100,
    "vocab_size": 50265,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_heads": 4, "num_layers": 2, "vocab_size": 1103}
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "vocab_size": 1024, "max_position_embeddings": 100,
}  # fmt: skip

# Name on the Hub -> type of model, what is built of it, its settings.
STAND_INS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", "OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": (
        "opt", "OPTForCausalLM", {**_OPT, "hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 2},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", "GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", "GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", "GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "bloom", "BloomForCausalLM", {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 1024},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", _GATED),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", _GATED),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", _GATED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", "MistralForCausalLM", _GATED),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", "Qwen2ForCausalLM", _GATED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "gemma3_text", "Gemma3ForCausalLM", {**_GATED, "head_dim": 8, "vocab_size": 262208},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "llama4_text", "Llama4ForCausalLM", {**_GATED, **_EXPERTS, "intermediate_size_mlp": 32},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", "GptOssForCausalLM", {**_GATED, **_EXPERTS}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "qwen3_moe", "Qwen3MoeForCausalLM", {**_GATED, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-t5": ("t5", "T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "t5", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", "BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("bert", "BertModel", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", "RobertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "deberta", "DebertaModel", {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", "DebertaV2Model", _ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "bert", "BertForSequenceClassification", _ENCODER,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "roberta", "RobertaForSequenceClassification", _ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "llama", "LlamaForSequenceClassification", {**_GATED, "pad_token_id": 1},
    ),
}  # fmt: skip


def write_models(cache: Path) -> None:
    """Write all of them into a cache of the Hub's client."""
    for name, (model_type, architecture, settings) in STAND_INS.items():
        folder = cache / ("models--" + name.replace("/", "--"))
        snapshot = folder / "snapshots" / ("0" * 40)
        if (snapshot / "config.json").exists():
            continue
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(snapshot.name)
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **settings)
        getattr(transformers, architecture)(config).save_pretrained(snapshot)
        _tokenizer().save_pretrained(snapshot)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


if __name__ == "__main__":
    write_models(Path(HF_HUB_CACHE))
