"""Examples -> token ids and labels. A label is the token's id where the token is trained, IGNORED elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_dist.data.example import Example
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
    """Tokens of the answer's words before the cut; 0 if they tokenised to nothing."""
    problem: str | None = None
    """Why the template refuses the row; the row is empty then."""

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
    """A TokenizedRow for each example, in order. The tokenizer must be a fast one (with offsets)."""
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        for ids, trained, problem in _encode(batch, tokenizer, template):
            # The end-of-turn token is trained with every answer; an answer is more than that.
            words = sum(mask and token != tokenizer.eos_token_id for token, mask in zip(ids, trained, strict=True))
            labels = [
                token if mask or not assistant_only_loss else IGNORED for token, mask in zip(ids, trained, strict=True)
            ]
            yield TokenizedRow(ids[:max_length], labels[:max_length], max(0, len(ids) - max_length), words, problem)


def _encode(
    batch: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[tuple[list[int], list[bool], str | None]]:
    """Token ids, for each whether it belongs to the answer, and why the template refuses the row, if it does."""
    rendered: list[Any] = [_render(example, tokenizer, template) for example in batch]
    for chat in (True, False):  # a template writes its own BOS; plain text gets the tokenizer's, if it has one
        chosen = [row for row, example in enumerate(batch) if bool(example.messages) is chat]
        if not chosen:
            continue
        encoded = tokenizer(
            [rendered[row][0] for row in chosen], add_special_tokens=not chat, return_offsets_mapping=True
        )
        for position, row in enumerate(chosen):
            ids = encoded["input_ids"][position]
            _, spans, problem = rendered[row]
            rendered[row] = (ids, _inside(encoded["offset_mapping"][position], spans), problem)
    yield from rendered


def _render(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[str, list[Span], str | None]:
    if not example.messages:
        return *_render_plain(example, tokenizer), None
    try:
        return *render_trained(tokenizer, template, example.messages, example.first_trained, example.tools), None
    except ConfigError as error:
        return "", [], error.message


def _render_plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Prompt and completion as one text that ends with the eos token, as TRL writes it."""
    prompt, completion = example.prompt or "", example.completion or ""
    eos = str(tokenizer.eos_token or "")
    text = prompt + completion + ("" if completion.endswith(eos) else eos)
    return text, [(len(prompt), len(text))]


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it lies between the first and the last one that share a character with a span.

    Tokens of white space have an empty range where the tokenizer trims offsets, so the ranges alone do not tell.
    """
    inside = [False] * len(offsets)
    token = 0
    for first, last in spans:  # ascending, as the tokens are
        while token < len(offsets) and (offsets[token][1] <= first or offsets[token][0] == offsets[token][1]):
            token += 1
        begin = end = token
        for index in range(begin, len(offsets)):
            if offsets[index][0] >= last and offsets[index][1] > offsets[index][0]:
                break
            if offsets[index][1] > offsets[index][0]:
                end = index + 1
        inside[begin:end] = [True] * (end - begin)
        token = end
    return inside
