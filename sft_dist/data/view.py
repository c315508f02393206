"""The prepared rows that are worth a look, as the trainer gets them: their tokens, what became of each, and where it is from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.config.schema import Config
from sft_dist.data.encode import unknown_token
from sft_dist.data.example import Example
from sft_dist.data.notes import Ints, Notes
from sft_dist.data.nothing import no_words
from sft_dist.data.page import Sample, Token
from sft_dist.data.prepared import Prepared
from sft_dist.data.preview import visible
from sft_dist.data.sources import opened, read_row
from sft_dist.data.template import ChatTemplate
from sft_dist.data.tokenize import IGNORED, Masks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens beyond max_length that are shown of a row, and tokens on the page after which no row is added: a browser must take it.
MOST_CUT, MOST_TOKENS = 1000, 2_000_000


def view(
    config: Config,
    prepared: Prepared,
    notes: Notes,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    count: int,
    padding: Ints | None = None,
) -> list[Sample]:
    """At most `count` of the rows of data.train, those that lead in some order, by their number.

    `padding` holds, where rows are padded, how many tokens of it each gets. The sources are read up to the last of these.
    """
    training, whole, ends = len(prepared.train), len(notes.sizes), np.cumsum(notes.sizes)
    usable = {
        row: notes.documents[ends[row] - notes.sizes[row] : ends[row]] if row < whole else notes.left_out[[row - whole]]
        for row in notes.leading(count, padding)
    }
    places = {int(place) for rows in usable.values() for place in notes.place[rows]}
    examples = _examples(config, places)
    drawing = _Drawing(config, tokenizer, template)
    found: list[Sample] = []
    tokens = 0
    for row, own in usable.items():
        of = [examples[int(place)] for place in notes.place[own]]
        cut = bool(notes.cut[own].any())
        if row < training:
            pad = 0 if padding is None else int(padding[row])
            found.append(drawing.row(row + 1, prepared.train[row], of, cut, padding=pad))
        elif row < whole and prepared.eval is not None:
            found.append(drawing.row(row + 1, prepared.eval[row - training], of, cut, note=" (held out)"))
        else:
            found.append(drawing.left_out(row + 1, of[0]))
        tokens += len(found[-1].tokens)
        if tokens > MOST_TOKENS:
            break
    return sorted(found, key=lambda sample: sample.number)


def view_left_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, count: int
) -> list[Sample]:
    """At most `count` of the rows of data.train, where nothing of any of them is trained."""
    usable = (
        example
        for part in config.data.train.parts
        for how, rows in [opened(part, config.data.system)]
        for row in rows
        if isinstance(example := read_row(row, how), Example)
    )
    drawing = _Drawing(config, tokenizer, template)
    return [drawing.left_out(number, example) for number, example in enumerate(itertools.islice(usable, count), 1)]


def pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int], trained: Sequence[bool]) -> list[str]:
    """Each token as text; of several tokens that make up one character the last one shows it, the others nothing."""
    found: list[str] = []
    held: tuple[int, ...] = ()
    for index, token in enumerate(ids):
        held = (*held, token)
        text = decode(held)
        last = index + 1 == len(ids) or trained[index + 1] != trained[index]
        if text.endswith("\ufffd") and len(held) < 4 and not last:
            found.append("")
        else:
            found.append(text)
            held = ()
    return found


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[tuple[int, ...]], str]:
    """Some tokens -> their text, kept for the next time."""
    return functools.lru_cache(maxsize=200_000)(lambda ids: str(tokenizer.decode(list(ids))))


def _examples(config: Config, places: set[int]) -> dict[int, Example]:
    """The rows that stand at these places of the sources."""
    found: dict[int, Example] = {}
    place = 0
    for part in config.data.train.parts:
        how, rows = opened(part, config.data.system)
        for row in rows:
            if place in places:
                example = read_row(row, how)
                found[place] = example if isinstance(example, Example) else Example(where=f"{row.origin}{row.number}")
            place += 1
            if len(found) == len(places):
                return found
    return found


class _Drawing:
    """Draws rows token by token."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.limit = config.data.max_length
        self.masks = Masks(tokenizer, template, config.data.trained)
        self.special, self.unknown = set(tokenizer.added_tokens_decoder), unknown_token(tokenizer)
        self.decode = decoder(tokenizer)
        self.pad = self._shown(str(tokenizer.pad_token))

    def row(
        self, number: int, row: dict[str, Any], of: Sequence[Example], cut: bool, *, padding: int = 0, note: str = ""
    ) -> Sample:
        """A prepared row, which holds the documents `of`; with the tokens that were `cut` off, and its `padding`."""
        ids, labels, packed = row["input_ids"], row["labels"], "seq_lengths" in row
        weights = row.get("loss_weights") or [1.0] * len(ids)
        tokens: list[Token] = []
        trained = beyond = at = 0
        for place, example in enumerate(of):
            end = at + row["seq_lengths"][place] if packed else len(ids)
            # The first token of a document has nothing to be predicted from.
            marks = [False, *(label != IGNORED for label in labels[at + 1 : end])]
            if packed:
                tokens.append(("d", f"document {place + 1} of {len(of)}: {visible(example.where)}"))
            tokens += self._tokens(ids[at:end], marks, weights[at:end])
            if cut and end - at == self.limit:
                tail, lost = self._beyond(next(self.masks.rows([example])).ids.tolist())
                tokens, beyond = tokens + tail, beyond + lost
            at, trained = end, trained + sum(marks)
        if padding:
            tokens.append(("p", f"{self.pad} \u00d7 {padding:,}"))
        where = f"packed row {number}" if packed else visible(of[0].where) + note
        unknown = sum(token == self.unknown for token in ids)
        return Sample(number, where, tokens, len(ids), trained, beyond, unknown, padding, len(of))

    def left_out(self, number: int, example: Example) -> Sample:
        """A row of which nothing is trained, and why."""
        row = next(self.masks.rows([example]))
        ids = row.ids.tolist()
        tail, lost = self._beyond(ids)
        why = "nothing of its answer is within max_length" if row.trained[self.limit :].any() else no_words(row)
        kept = ids[: self.limit]
        tokens = self._tokens(kept, [False] * len(kept), [1.0] * len(kept)) + tail
        where = visible(f"{example.where}: left out: {row.problem or why}")
        return Sample(number, where, tokens, len(kept), 0, lost, sum(token == self.unknown for token in kept))

    def _tokens(self, ids: Sequence[int], trained: Sequence[bool], weights: Sequence[float]) -> list[Token]:
        found: list[Token] = []
        before = 1.0
        for token, text, mark, weight in zip(ids, pieces(self.decode, ids, trained), trained, weights, strict=True):
            if mark and weight != before:
                found.append(("x", f"\u00d7{weight:g}"))
                before = weight
            plain, special = ("t", "B") if mark else ("m", "b")
            kind = "u" if token == self.unknown else special if token in self.special else plain
            found.append((kind, self._shown(text)))
        return found

    def _beyond(self, ids: Sequence[int]) -> tuple[list[Token], int]:
        """What of these tokens is beyond max_length, and how many that are."""
        ids = ids[self.limit :]
        shown = [
            ("c", self._shown(text)) for text in pieces(self.decode, ids[:MOST_CUT], [False] * len(ids[:MOST_CUT]))
        ]
        more = len(ids) - len(shown)
        return shown + ([("c", f" \u2026 and {more:,} more")] if more else []), len(ids)

    def _shown(self, text: str) -> str:
        return visible(text, spaces=True).replace("\u21b5", "\u21b5\n")
