"""Examples -> token ids and labels. A label is the token's id where the token is trained, IGNORED elsewhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import LossOn
from sft_dist.data.encode import Encoded, EncodedWithoutPlaces, Encoder, common_prefix
from sft_dist.data.example import Example, Message
from sft_dist.data.template import ChatTemplate, Span, refuse_unseen, render, render_turns
from sft_dist.data.words import refuse_lost, refuse_without_effect, spans_of_others
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
    weights: list[float] | None = None
    """How much each token counts in the loss; None if the trained ones count 1."""

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class MaskedRow:
    """One row before it is cut."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    turns: tuple[tuple[int, int], ...] = ()
    """The trained answers: from which token to which."""
    problem: str | None = None
    """Why the template refuses the row; the row is empty then."""
    encoded: Encoded | EncodedWithoutPlaces | None = None
    """The row's text and where its tokens are from."""
    doubled_bos: bool = False
    """Whether a second token of the text's beginning was taken out."""
    weights: NDArray[np.float32] | None = None
    """How much each token counts in the loss; None if all trained ones count 1. An untrained one's is 0."""


@dataclass(frozen=True)
class _Rendered:
    text: str = ""
    chat: bool = False
    spans: tuple[Span, ...] = ()
    """Answers that are trained."""
    untrained: tuple[Span, ...] = ()
    """Messages that are not, where all the rest is."""
    prompt: str | None = None
    """The text up to the completion, where only what follows it is trained."""
    everything: bool = False
    weights: tuple[tuple[Span, float], ...] = ()
    """Messages whose tokens count other than once."""
    problem: str | None = None


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    max_length: int,
    assistant_only_loss: bool = True,
    loss_on: LossOn = "assistant",
) -> Iterator[TokenizedRow]:
    """A TokenizedRow for each example, in order."""
    masks = Masks(tokenizer, template, loss_on if assistant_only_loss else "all")
    for start in range(0, len(examples), BATCH):
        for row in masks.rows(examples[start : start + BATCH]):
            words = int((row.trained & (row.ids != tokenizer.eos_token_id)).sum())
            labels = np.where(row.trained, row.ids, IGNORED)[:max_length].tolist()
            cut = max(0, len(row.ids) - max_length)
            weights = None if row.weights is None else row.weights[:max_length].tolist()
            yield TokenizedRow(row.ids[:max_length].tolist(), labels, cut, words, row.problem, weights)


class Masks:
    """Turns examples into tokens and says which of them are trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, loss_on: LossOn) -> None:
        self.tokenizer, self.template, self.loss_on = tokenizer, template, loss_on
        self.encoder = Encoder(tokenizer)
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        # The tokenizer cuts a text at these before anything else: what stands before one does not touch what follows.
        self._cuts = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._tail_ids = functools.lru_cache(maxsize=1000)(self._ids)
        opening = self.encoder.ids("", add_special_tokens=True)[:1]
        self._adds_bos = opening == [tokenizer.bos_token_id]

    def rows(self, examples: Sequence[Example]) -> Iterator[MaskedRow]:
        """A MaskedRow for each example, in order; they are tokenised as one batch."""
        rendered = [self._render(example) for example in examples]
        made: dict[int, MaskedRow] = {}
        for chat in (True, False):  # a template writes its own BOS; plain text gets the tokenizer's, if it has one
            chosen = [row for row, one in enumerate(rendered) if one.chat is chat]
            texts = [rendered[row].text for row in chosen]
            encoded = self.encoder.encode(texts, add_special_tokens=not chat) if texts else []
            for row, one in zip(chosen, encoded, strict=True):
                made[row] = self._masked(rendered[row], one)
        for row, source in enumerate(rendered):
            whole = made[row]
            yield MaskedRow(whole.ids[:0], whole.trained[:0], problem=source.problem) if source.problem else whole

    def unknown_texts(self, row: MaskedRow) -> list[str]:
        """What stands in the text where the row has the token for what the vocabulary does not know."""
        if not isinstance(row.encoded, Encoded) or row.encoded.in_bytes:
            return []
        one = row.encoded
        places = np.flatnonzero(one.ids == self.tokenizer.unk_token_id)
        return [one.text[int(one.starts[place]) : int(one.ends[place])] for place in places]

    def _ids(self, text: str, chat: bool) -> list[int]:
        return self.encoder.ids(text, add_special_tokens=not chat)

    def _render(self, example: Example) -> _Rendered:
        if not example.messages:
            return self._render_plain(example)
        try:
            return self._render_chat(example)
        except ConfigError as error:
            return _Rendered(chat=True, problem=error.message)

    def _render_plain(self, example: Example) -> _Rendered:
        """Prompt and completion as one text that ends with the eos token, as TRL writes it."""
        prompt, completion = example.prompt or "", example.completion or ""
        eos, bos = str(self.tokenizer.eos_token or ""), str(self.tokenizer.bos_token or "")
        if self._adds_bos and bos and (prompt or completion).startswith(bos):
            prompt, completion = (prompt[len(bos) :], completion) if prompt else (prompt, completion[len(bos) :])
        text = prompt + completion + ("" if completion.endswith(eos) else eos)
        if not prompt or self.loss_on == "all":
            return _Rendered(text, everything=True)
        return _Rendered(text, prompt=prompt, everything=True)

    def _render_chat(self, example: Example) -> _Rendered:
        messages, tools = example.messages, example.tools
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        refused = [turn for turn in answers if not messages[turn].get("train", True)]
        weighted = [turn for turn in answers if "weight" in messages[turn]]
        start = example.first_trained or (answers[-1] if self.loss_on == "completion" else 0)
        if self.loss_on != "all":
            refuse_without_effect(messages[:start] if self.loss_on == "completion" else messages, self.loss_on)
        if self.loss_on in ("all", "completion"):
            # No answer needs to be told apart, so the template is the one for asking, as in TRL.
            told_apart = bool(refused or weighted)
            own = self.template.training_text if told_apart else self.template.text
            text, turns = (
                render_turns(self.tokenizer, self.template, messages, tools)
                if told_apart
                else (self._text(own, messages, tools), {})
            )
            again = functools.partial(self._text, own, tools=tools)
            refuse_lost(again, messages, text)
            turns = turns | spans_of_others(again, messages, text, self._cuts)
            untrained = tuple(span for turn in turns if not messages[turn].get("train", True) for span in turns[turn])
            weights = tuple((span, messages[turn].get("weight", 1.0)) for turn in turns for span in turns[turn])
            prompt = self._text(own, messages[:start], tools, True) if self.loss_on == "completion" else None
            return _Rendered(text, True, untrained=untrained, prompt=prompt, everything=True, weights=weights)
        text, turns = render_turns(self.tokenizer, self.template, messages, tools)
        refuse_lost(functools.partial(self._text, self.template.training_text, tools=tools), messages, text)
        weights = tuple((span, messages[turn]["weight"]) for turn in weighted for span in turns[turn])
        prompt = self._text(self.template.training_text, messages[:start], tools, True) if start else None
        chosen = [turn for turn in answers if turn >= start and turn not in refused]
        if self.loss_on == "last":
            chosen = [turn for turn in chosen if turn == answers[-1]]
        spans = tuple(span for turn in chosen for span in turns[turn])
        return _Rendered(text, True, spans, prompt=prompt, weights=weights)

    def _text(self, template: str, messages: Sequence[Message], tools: Sequence[Any], asking: bool = False) -> str:
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        refuse_unseen(template, messages, tools)
        return render(self.tokenizer, template, messages, add_generation_prompt=asking, **options)

    def _masked(self, row: _Rendered, encoded: Encoded | EncodedWithoutPlaces) -> MaskedRow:
        ids = encoded.ids
        trained = np.full(len(ids), row.everything)
        turns = []
        for wanted, spans in ((True, row.spans), (False, row.untrained)):
            for span in spans:
                begin, end = encoded.between(*span)
                trained[begin:end] = wanted
                if wanted:
                    turns.append((begin, end))
        if row.prompt is not None:
            trained[: self._prompt_length(row, encoded)] = False
        weights = _weights(row, encoded, trained)
        bos = self.tokenizer.bos_token_id
        doubled = bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos
        if doubled:
            ids, trained, turns = ids[1:], trained[1:], [(begin - 1, end - 1) for begin, end in turns]
            weights = None if weights is None else weights[1:]
        return MaskedRow(ids, trained, tuple(turns), None, encoded, bool(doubled), weights)

    def _prompt_length(self, row: _Rendered, encoded: Encoded | EncodedWithoutPlaces) -> int:
        """Tokens that the prompt alone has in common with the whole row: TRL's way to tell where a completion begins."""
        prompt = row.prompt or ""
        ids = encoded.ids.tolist()
        cuts = [found.end() for found in self._cuts.finditer(prompt)] if row.text.startswith(prompt) else []
        if not cuts or not row.chat:
            return common_prefix(self._tail_ids(prompt, row.chat), ids)
        before = encoded.before(cuts[-1])
        return before + common_prefix(self._tail_ids(prompt[cuts[-1] :], True), ids[before:])


def _weights(
    row: _Rendered, encoded: Encoded | EncodedWithoutPlaces, trained: NDArray[np.bool_]
) -> NDArray[np.float32] | None:
    """How much each token counts, if some trained one counts other than once."""
    if not row.weights:
        return None
    weights = trained.astype(np.float32)
    for span, weight in row.weights:
        begin, end = encoded.between(*span)
        weights[begin:end] *= weight
    return None if (weights == trained).all() else weights
