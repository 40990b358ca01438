"""Talks and preferences of invented words, with a tokenizer for them: what TRL's trainers take, made offline."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant"]
# With the marks that `assistant_only_loss` asks for.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'assistant ' }}{% generation %}"
    "{{ message.content + ' </s>' }}{% endgeneration %}{% else %}{{ 'user ' + message.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


class InventedTalks:
    """Thirty-two talks of a user and an assistant, each with a worse answer as well.

    Args:
        vocabulary_size: how many words there are; the tokenizer has six tokens more.
        words: how many the assistant says at most, at least 10; the user says a quarter of it.

    Attributes:
        words: as given.
        tokens: what a model's config is told of the vocabulary.
    """

    def __init__(self, vocabulary_size: int, words: int) -> None:
        self._vocabulary = [f"word{index}" for index in range(vocabulary_size)]
        self.words = words
        size = vocabulary_size + len(SPECIAL)
        self.tokens = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def talks(self) -> Dataset:
        """For `SFTTrainer`."""
        rows = [self._said(seed, "user", self.words // 4) + self._answer(seed) for seed in range(32)]
        return Dataset.from_dict({"messages": rows})

    def preferences(self) -> Dataset:
        """For `DPOTrainer` and `RewardTrainer`."""
        rows = [
            {
                "prompt": self._said(seed, "user", self.words // 4),
                "chosen": self._answer(seed),
                "rejected": self._said(seed + 999, "assistant", self.words - seed % (self.words // 10)),
            }
            for seed in range(32)
        ]
        return Dataset.from_list(rows)

    def prompts(self) -> Dataset:
        """For `GRPOTrainer`."""
        return self.preferences().select_columns(["prompt"])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for each word."""
        vocabulary = {word: index for index, word in enumerate(SPECIAL + self._vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)

    def _answer(self, seed: int) -> list[dict[str, str]]:
        return self._said(seed + 99, "assistant", self.words - seed % (self.words // 5))

    def _said(self, seed: int, role: str, length: int) -> list[dict[str, str]]:
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randint(len(self._vocabulary), (length,), generator=generator).tolist()
        return [{"role": role, "content": " ".join(self._vocabulary[index] for index in picked)}]


def score(completions: list, **_: object) -> list[float]:
    """A reward for `GRPOTrainer` that differs from one completion to another."""
    return [float(sum(map(ord, completion[0]["content"])) % 5) for completion in completions]
