"""From start and end logits to answers in the words of the context."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import torch
from datasets import Dataset
from torch import Tensor

# Windows without the answer are labelled with their first token, as is usual: [CLS] in BERT.
NO_ANSWER = 0


def best_spans(
    start_logits: Tensor, end_logits: Tensor, first: Tensor, last: Tensor, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The span of each window that has the greatest sum of start and end logit.

    Args:
        start_logits: (windows, tokens).
        end_logits: (windows, tokens).
        first: (windows,), the first token of the context in each window.
        last: (windows,), the last token of the context in each window.
        max_tokens: the length of the longest span.

    Returns:
        First and last token of the spans (integers), their scores, and those of no answer (float32), each (windows,).
    """
    start_logits, end_logits = start_logits.float(), end_logits.float()
    tokens = torch.arange(start_logits.shape[1], device=start_logits.device)
    in_context = (tokens >= first[:, None]) & (tokens <= last[:, None])
    length = tokens[None, :] - tokens[:, None] + 1
    allowed = in_context[:, :, None] & in_context[:, None, :] & (length >= 1) & (length <= max_tokens)
    scores = start_logits[:, :, None] + end_logits[:, None, :]
    score, position = scores.masked_fill(~allowed, -inf).flatten(1).max(1)
    no_answer = start_logits[:, NO_ANSWER] + end_logits[:, NO_ANSWER]
    return position // len(tokens), position % len(tokens), score, no_answer


def best_answers(
    spans: Iterable[tuple[int, int, int, float, float]], windows: Dataset, contexts: list[str], may_have_none: bool
) -> list[str]:
    """The best answer to each question over all windows of its context.

    Args:
        spans: of each window its number, and what `best_spans` found.
        windows: rows with the number of their question in `row`, and the first and last character of each token in
            `offset_mapping`.
        contexts: the context of each question.
        may_have_none: whether a question may have no answer. Then it has none, an empty string, where every window
            scores that higher than the best span of all.
    """
    best = [(-inf, "")] * len(contexts)
    no_answer = [inf] * len(contexts)
    for window, start, end, score, no_answer_score in spans:
        question, characters = windows[window]["row"], windows[window]["offset_mapping"]
        text = contexts[question][characters[start][0] : characters[end][1]]
        best[question] = max(best[question], (score, text))
        no_answer[question] = min(no_answer[question], no_answer_score)
    return ["" if may_have_none and none > score else text for (score, text), none in zip(best, no_answer, strict=True)]
