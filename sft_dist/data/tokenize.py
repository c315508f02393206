"""Examples -> token ids and labels. A label is the token's id where the token is trained, IGNORED elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_dist.data.formats import Example
from sft_dist.data.template import ChatTemplate, Span, render_trained
from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# Rows that the tokenizer takes at once: enough to keep its threads busy, few enough to bound the memory.
BATCH = 500


@dataclass(frozen=True)
class TokenizedRow:
    """One row as the model sees it; `input_ids` and `labels` have the same length, at most `max_length`."""

    input_ids: list[int]
    labels: list[int]
    cut: int
    """Tokens beyond `max_length` that were left out."""
    answer: int
    """Tokens of the answer before the cut; 0 if it tokenised to nothing."""

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    max_length: int,
    assistant_only_loss: bool = True,
) -> Iterator[TokenizedRow]:
    """A TokenizedRow for each example, in order; raises ConfigError for a tokenizer without offsets."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} cannot say which characters a token came from",
            hint="use a model with a fast tokenizer (a tokenizer.json)",
        )
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        for ids, trained in _encode(batch, tokenizer, template):
            labels = [
                token if mask or not assistant_only_loss else IGNORED for token, mask in zip(ids, trained, strict=True)
            ]
            yield TokenizedRow(ids[:max_length], labels[:max_length], max(0, len(ids) - max_length), sum(trained))


def _encode(
    batch: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids and, for each, whether it belongs to the answer."""
    rendered: list[Any] = [
        render_trained(tokenizer, template, example.messages, example.first_trained)
        if example.messages
        else _render_plain(example, tokenizer)
        for example in batch
    ]
    for chat in (True, False):  # a template writes its own BOS; plain text gets the tokenizer's, if it has one
        chosen = [row for row, example in enumerate(batch) if bool(example.messages) is chat]
        if not chosen:
            continue
        encoded = tokenizer(
            [rendered[row][0] for row in chosen], add_special_tokens=not chat, return_offsets_mapping=True
        )
        for position, row in enumerate(chosen):
            ids = encoded["input_ids"][position]
            rendered[row] = (ids, _inside(encoded["offset_mapping"][position], rendered[row][1]))
    yield from rendered


def _render_plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Prompt and completion as one text that ends with the eos token, as TRL writes it."""
    prompt, completion = example.prompt or "", example.completion or ""
    eos = str(tokenizer.eos_token or "")
    text = prompt + completion + ("" if completion.endswith(eos) else eos)
    return text, [(len(prompt), len(text))]


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it shares a character with one of the ascending `spans`."""
    inside, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        inside.append(current < len(spans) and end > spans[current][0] and end > start)
    return inside
