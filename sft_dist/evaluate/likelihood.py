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

from sft_dist.data.encode import Encoder
from sft_dist.data.template import render
from sft_dist.errors import ConfigError
from sft_dist.evaluate.asked import Asked, by_batches
from sft_dist.evaluate.generate import Prompt, ends_with, left_pad, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Candidate:
    """A prompt with one answer: all token ids, and the index of the answer's first token."""

    ids: list[int]
    first: int


def candidate(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    label: str,
    enable_thinking: bool | None = None,
    what: str = "evaluate.labels",
) -> Candidate:
    """The tokens of `label` as they follow the prompt; a token that spans the border counts to the label.

    Raises ConfigError if the label has none, which names `what` it is.
    """
    text, templated = prompt_text(tokenizer, prompt, enable_thinking)
    answered, start = _answered(tokenizer, prompt, text, label)
    ids, first = _tokens_from(tokenizer, answered, start, add_special_tokens=not templated)
    if not templated:
        ids = ids[: len(ids) - ends_with(tokenizer)]
    if not label.strip() or first >= len(ids):
        raise ConfigError(
            f"{what}: {label!r} tokenises to nothing, so it has no likelihood",
            hint="remove it, or write it with characters that the tokenizer knows",
        )
    return Candidate(ids, first)


def _tokens_from(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, *, add_special_tokens: bool
) -> tuple[list[int], int]:
    """The tokens of `text`, and the first one of what stands from `start` on; their number if none is."""
    if not tokenizer.is_fast:  # written in Python: it cannot say where its tokens are from
        (found,) = Encoder(tokenizer).encode([text], add_special_tokens=add_special_tokens)
        return found.ids.tolist(), found.before(start)
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]
    inside = (index for index, (begin, end) in enumerate(places) if end > max(begin, start))
    return ids, next(inside, len(ids))


def _answered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, label: str) -> tuple[str, int]:
    """The prompt with the answer `label`, and where the label starts: a template may put a space or a tag before it."""
    if not isinstance(prompt, str):
        rendered = render(tokenizer, str(tokenizer.chat_template), [*prompt, {"role": "assistant", "content": label}])
        start = rendered.find(label, len(text))
        if rendered.startswith(text) and start >= 0:
            return rendered[: start + len(label)], start
    glue = " " if isinstance(prompt, str) and not text[-1:].isspace() else ""
    return text + glue + label, len(text + glue)


@torch.no_grad()  # no inference mode: a model that trains on may keep tables that it makes here
def label_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    batch_size: int = 8,
    enable_thinking: bool | None = None,
    asked: Asked | None = None,
) -> list[dict[str, float]]:
    """For each prompt the score of each label, in the order given.

    A batch of prompts goes through the model once; its key/value cache then serves all labels. With `asked`, what stands
    there is not computed again.
    """
    rows = [[candidate(tokenizer, prompt, label, enable_thinking) for label in labels] for prompt in prompts]
    shared = [_shared_length(row) for row in rows]
    keys = [asked.key("labels", index, [it.ids for it in row]) for index, row in enumerate(rows)] if asked else ()

    def score(batch: list[int]) -> list[dict[str, float]]:
        values = _score_batch(
            model, [rows[index] for index in batch], [shared[index] for index in batch], int(tokenizer.pad_token_id)
        )
        return [dict(zip(labels, row, strict=True)) for row in values.tolist()]

    return by_batches(shared, batch_size, score, asked, keys)


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    batch_size: int = 8,
    enable_thinking: bool | None = None,
    asked: Asked | None = None,
) -> list[tuple[float, int]]:
    """For each prompt the log-probability of its answer, summed over the answer's tokens, and how many these are.

    Natural logarithm; the end-of-turn token is not counted. Raises ConfigError for an answer without tokens.
    """
    rows = [
        candidate(tokenizer, prompt, text, enable_thinking, what="an expected answer")
        for prompt, text in zip(prompts, answers, strict=True)
    ]
    keys = [asked.key("logprob", index, row.ids, row.first) for index, row in enumerate(rows)] if asked else ()

    def score(batch: list[int]) -> list[tuple[float, int]]:
        chosen = [rows[index] for index in batch]
        inputs = left_pad([row.ids for row in chosen], int(tokenizer.pad_token_id), model.device)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        counts = [len(row.ids) - max(row.first, 1) for row in chosen]
        longest = max(counts)
        # The answers stand at the right edge: only there are the vocabulary's scores computed.
        logits = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=longest + 1).logits
        targets = inputs["input_ids"][:, -longest:]
        found = logits[:, -longest - 1 : -1].float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0].cpu()
        return [(float(row[longest - count :].double().sum()), count) for row, count in zip(found, counts, strict=True)]

    return by_batches([len(row.ids) for row in rows], batch_size, score, asked, keys)


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
