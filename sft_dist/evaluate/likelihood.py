"""How likely a model finds each of several answers to a prompt.

The score of a label is the mean log-probability of its tokens, given all that stands before it: (1/n) sum_i log p(t_i |
t_<i), natural logarithm, without the end-of-turn token. The mean makes long and short labels comparable. What all labels
share (the prompt, and what the template puts before an answer) goes through the model once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sft_dist.data.template import render
from sft_dist.errors import ConfigError
from sft_dist.evaluate.generate import Prompt, left_pad, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Candidate:
    """A prompt with one answer: all token ids, and the index of the answer's first token."""

    ids: list[int]
    first: int


def candidate(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, label: str, enable_thinking: bool | None = None
) -> Candidate:
    """The tokens of `label` as they follow the prompt; a token that spans the border counts to the label.

    Raises ConfigError if the label has none.
    """
    text, templated = prompt_text(tokenizer, prompt, enable_thinking)
    answered, start = _answered(tokenizer, prompt, text, label)
    encoded = tokenizer(answered, add_special_tokens=not templated, return_offsets_mapping=True)
    inside = [index for index, (begin, end) in enumerate(encoded["offset_mapping"]) if end > max(begin, start)]
    if not label.strip() or not inside:
        raise ConfigError(
            f"evaluate.labels: {label!r} tokenises to nothing, so it has no likelihood",
            hint="remove the label, or write it with characters that the tokenizer knows",
        )
    return Candidate(list(encoded["input_ids"]), inside[0])


def _answered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, label: str) -> tuple[str, int]:
    """The prompt with the answer `label`, and where the label starts: a template may put a space or a tag before it."""
    if not isinstance(prompt, str):
        rendered = render(tokenizer, str(tokenizer.chat_template), [*prompt, {"role": "assistant", "content": label}])
        start = rendered.find(label, len(text))
        if rendered.startswith(text) and start >= 0:
            return rendered[: start + len(label)], start
    glue = " " if isinstance(prompt, str) and not text[-1:].isspace() else ""
    return text + glue + label, len(text + glue)


@torch.inference_mode()
def label_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    batch_size: int = 8,
    enable_thinking: bool | None = None,
) -> list[dict[str, float]]:
    """For each prompt the score of each label, in the order given.

    A batch of prompts goes through the model once; its key/value cache then serves all labels.
    """
    rows = [[candidate(tokenizer, prompt, label, enable_thinking) for label in labels] for prompt in prompts]
    shared = [_shared_length(row) for row in rows]
    order = sorted(range(len(prompts)), key=lambda index: shared[index])
    scores: list[dict[str, float]] = [{} for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        values = _score_batch(
            model, [rows[index] for index in batch], [shared[index] for index in batch], int(tokenizer.pad_token_id)
        )
        for row, index in enumerate(batch):
            scores[index] = dict(zip(labels, values[row].tolist(), strict=True))
    return scores


def _shared_length(row: Sequence[Candidate]) -> int:
    """How many leading tokens all answers to one prompt share, none of them the label's own."""
    columns = zip(*(option.ids for option in row), strict=False)
    same = next((index for index, tokens in enumerate(columns) if len(set(tokens)) > 1), len(row[0].ids))
    length = min(same, *(option.first for option in row))
    if length == 0:
        raise ConfigError("a held-out row's prompt shares no token with its answers, so no likelihood can be given")
    return length


def _score_batch(
    model: PreTrainedModel, rows: Sequence[Sequence[Candidate]], shared: Sequence[int], pad: int
) -> torch.Tensor:
    """Mean log-probability [prompts, labels], float32."""
    device, labels = model.device, len(rows[0])
    inputs = left_pad([row[0].ids[:length] for row, length in zip(rows, shared, strict=True)], pad, device)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prefix = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    first = prefix.logits[:, -1].float().log_softmax(-1)  # [prompts, vocabulary]: the token after what is shared

    rests = [option.ids[length:] for row, length in zip(rows, shared, strict=True) for option in row]
    skipped = [option.first - length for row, length in zip(rows, shared, strict=True) for option in row]
    width = max(map(len, rests))
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in rests], device=device)
    column = torch.arange(width, device=device)
    real = column < torch.tensor([len(ids) for ids in rests], device=device)[:, None]
    counted = real & (column >= torch.tensor(skipped, device=device)[:, None])
    total = first.repeat_interleave(labels, 0).gather(1, tokens[:, :1])
    if width > 1:
        cache = prefix.past_key_values
        cache.batch_repeat_interleave(labels)
        after = positions[:, -1:].repeat_interleave(labels, 0) + 1 + column[:-1]
        logits = model(
            input_ids=tokens[:, :-1],
            attention_mask=torch.cat([mask.repeat_interleave(labels, 0), real[:, :-1].to(mask.dtype)], dim=1),
            position_ids=after,
            past_key_values=cache,
        ).logits
        rest = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[:, :, 0]
        total = torch.cat([total, rest], dim=1)
    mean = (total * counted).sum(1) / counted.sum(1)
    scores: torch.Tensor = mean.view(len(rows), labels).cpu()
    return scores
