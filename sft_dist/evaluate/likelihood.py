"""How likely a model finds each of several answers to a prompt.

The score of a label is the mean log-probability of its tokens, given the prompt: (1/n) sum_i log p(t_i | prompt,
t_<i), natural logarithm, without the end-of-turn token. The mean makes long and short labels comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sft_dist.data.template import render
from sft_dist.errors import ConfigError
from sft_dist.evaluate.generate import Prompt, left_pad, prompt_ids, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def label_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, label: str) -> list[int]:
    """The label's tokens as they follow the prompt (a word may tokenise differently at the start of a text).

    Raises ConfigError if there are none.
    """
    text, templated = prompt_text(tokenizer, prompt)
    start = len(tokenizer(text, add_special_tokens=not templated)["input_ids"])
    answered = text + _continuation(tokenizer, prompt, text, label)
    ids = list(tokenizer(answered, add_special_tokens=not templated)["input_ids"][start:])
    if not label.strip() or not ids:
        raise ConfigError(
            f"evaluate.labels: {label!r} tokenises to nothing, so it has no likelihood",
            hint="remove the label, or write it with characters that the tokenizer knows",
        )
    return ids


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, label: str) -> str:
    """What follows the prompt when the answer is `label`: the template may put a space or a tag before it."""
    if not isinstance(prompt, str):
        answer = {"role": "assistant", "content": label}
        rendered = render(tokenizer, str(tokenizer.chat_template), [*prompt, answer])
        end = rendered.find(label, len(text)) + len(label)
        if rendered.startswith(text) and end > len(text):
            return rendered[len(text) : end]
    return label if text[-1:].isspace() else f" {label}"


@torch.inference_mode()
def label_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """For each prompt the score of each label, in the order given.

    A batch of prompts goes through the model once; its key/value cache then serves all labels.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    scores: list[dict[str, float]] = [{} for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        candidates = [[label_ids(tokenizer, prompts[index], label) for label in labels] for index in batch]
        values = _score_batch(model, [encoded[index] for index in batch], candidates, int(tokenizer.pad_token_id))
        for row, index in enumerate(batch):
            scores[index] = dict(zip(labels, values[row].tolist(), strict=True))
    return scores


def _score_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]], pad: int
) -> torch.Tensor:
    """Mean log-probability [prompts, labels], float32."""
    device, labels = model.device, len(candidates[0])
    inputs = left_pad(prompts, pad, device)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prefix = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    first = prefix.logits[:, -1].float().log_softmax(-1)  # [prompts, vocabulary]: the token after the prompt

    rows = [list(ids) for prompt in candidates for ids in prompt]
    width = max(map(len, rows))
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows], device=device)
    real = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=device)
    total = first.repeat_interleave(labels, 0).gather(1, tokens[:, :1])
    if width > 1:
        cache = prefix.past_key_values
        cache.batch_repeat_interleave(labels)
        after = positions[:, -1:].repeat_interleave(labels, 0) + 1 + torch.arange(width - 1, device=device)
        logits = model(
            input_ids=tokens[:, :-1],
            attention_mask=torch.cat([mask.repeat_interleave(labels, 0), real[:, :-1]], dim=1),
            position_ids=after,
            past_key_values=cache,
        ).logits
        rest = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[:, :, 0]
        total = torch.cat([total, rest], dim=1)
    mean = (total * real).sum(1) / real.sum(1)
    scores: torch.Tensor = mean.view(len(prompts), labels).cpu()
    return scores
