"""Texts -> token ids, and which characters each token came from.

The library's own offsets are Python objects for every token, which take longer to make than the tokens. Where each token
stands for a known number of bytes, as in the byte-level vocabularies of most chat models, their sums say the same.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.pieces import Pieces, cut_at_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]
SPACE = "\u0120"  # how byte-level vocabularies write a space
PROBES = (
    "Hello,  world\n\n  x\t\tyes   \n1234 a'b \u6771\u4eac \U0001f389\u200d \u00e9e\u0301 end ",
    "   leading",
    "trailing   ",
    " a \n  b\t c 12  3 .  d\u3000 e \n\n f\r\n g  ",
)


@dataclass(frozen=True)
class Encoded:
    """One text's tokens; token i stands for the characters (or bytes) from `starts[i]` to `ends[i]`.

    The range of a token of white space may be empty, as the library trims it.
    """

    text: str
    ids: Ints
    starts: Ints
    ends: Ints
    in_bytes: bool
    """Whether `starts` and `ends` count the bytes of the text in UTF-8, not its characters."""

    def between(self, first: int, last: int) -> tuple[int, int]:
        """The tokens (from, to) of which the first and the last share a character with text[first:last]."""
        filled, starts, ends = self._filled
        begin = int(ends.searchsorted(self._place(first), side="right"))
        end = int(starts.searchsorted(self._place(last), side="left"))
        return (int(filled[begin]), int(filled[end - 1]) + 1) if begin < end else (0, 0)

    def before(self, first: int) -> int:
        """How many tokens stand before text[first:], if one ends there."""
        filled, _, ends = self._filled
        count = int(ends.searchsorted(self._place(first), side="right"))
        return int(filled[count - 1]) + 1 if count else 0

    @functools.cached_property
    def _filled(self) -> tuple[Ints, Ints, Ints]:
        """The tokens whose range is not empty, and where these ranges start and end."""
        filled = np.flatnonzero(self.ends > self.starts)
        return filled, self.starts[filled], self.ends[filled]

    def _place(self, character: int) -> int:
        return len(self.text[:character].encode()) if self.in_bytes and not self.text.isascii() else character


@dataclass(frozen=True)
class EncodedWithoutPlaces:
    """The same, of a tokenizer that cannot say where its tokens are from: it is asked for the text up to there."""

    text: str
    ids: Ints
    prefix: Callable[[str], list[int]]

    def between(self, first: int, last: int) -> tuple[int, int]:
        begin, whole = self.before(first), self.prefix(self.text[:last])
        end = common_prefix(whole, self.ids.tolist())
        # A token that goes on beyond the end shares characters with it, too.
        return begin, min(len(self.ids), end + (end < len(whole)))

    def before(self, first: int) -> int:
        return common_prefix(self.prefix(self.text[:first]), self.ids.tolist())


class Encoder:
    """A tokenizer and what is known of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self._composed = False
        """Whether the tokenizer brings text into Unicode's composed form first (NFC), so that other text has other bytes."""
        self._bytes: tuple[Ints, Ints, Ints] | None = None
        """Of each token by its id: its bytes, and how many spaces it begins and ends with, if those are trimmed."""
        if self.backend is not None:
            # What the last call of the tokenizer set would go for the batches below, too.
            self.backend.no_truncation()
            self.backend.no_padding()
            self._bytes = self._token_bytes()
        self._pieces: Pieces | None = None
        if self._bytes is not None and cut_at_spaces(self.backend, tokenizer.added_tokens_decoder.values()):
            pieces = Pieces(self.backend, self._bytes[0])
            if all(pieces.encode([text])[0].tolist() == self._batch([text], False)[0].ids for text in PROBES):
                self._pieces = pieces

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Encoded | EncodedWithoutPlaces]:
        """Each text's tokens."""
        if self.backend is None:
            return [self._without_places(text, add_special_tokens) for text in texts]
        if self._bytes is None or add_special_tokens:
            batch = self._batch(texts, add_special_tokens)
            return [_from_offsets(text, one) for text, one in zip(texts, batch, strict=True)]
        if self._pieces is not None:
            found = self._pieces.encode(texts)
        else:
            batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            found = [np.array(one.ids, dtype=np.int64) for one in batch]
        return [self._summed(text, ids) for text, ids in zip(texts, found, strict=True)]

    def ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """One text's tokens without their places."""
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _batch(self, texts: Sequence[str], add_special_tokens: bool) -> Any:
        return self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)

    def _summed(self, text: str, ids: Ints) -> Encoded:
        """The places of tokens from their bytes; from the library if the text is not what the tokens spell."""
        assert self._bytes is not None
        size, leading, trailing = (table[ids] for table in self._bytes)
        ends = np.cumsum(size)
        whole = len(text) if text.isascii() else len(text.encode())
        composed = not self._composed or text.isascii() or unicodedata.is_normalized("NFC", text)
        if not composed or (int(ends[-1]) if len(ends) else 0) != whole:
            return _from_offsets(text, self._batch([text], False)[0])
        starts = np.minimum(ends - size + leading, ends)
        return Encoded(text, ids, starts, np.maximum(ends - trailing, starts), True)

    def _token_bytes(self) -> tuple[Ints, Ints, Ints] | None:
        parts = ("normalizer", "decoder", "post_processor")
        settings = {name: _settings(getattr(self.backend, name)) for name in parts}
        normalizer = settings["normalizer"]
        if normalizer is not None and normalizer.get("type") != "NFC":
            return None
        self._composed = normalizer is not None
        if (settings["decoder"] or {}).get("type") != "ByteLevel":
            return None
        vocabulary = self.tokenizer.get_vocab()
        size = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        leading, trailing = size.copy(), size.copy()
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        trimmed = _trims(settings["post_processor"])
        for token, number in vocabulary.items():
            size[number] = len(token.encode()) if token in added else len(token)
            if token not in added and trimmed:
                leading[number] = len(token) - len(token.lstrip(SPACE))
                trailing[number] = len(token) - len(token.rstrip(SPACE))
        self._bytes = size, leading, trailing
        return self._bytes if all(map(self._agrees, PROBES)) else None

    def _agrees(self, text: str) -> bool:
        """Whether the sums are the library's offsets on this text, token by token."""
        real = self._batch([text], False)[0]
        summed = self._summed(text, np.array(real.ids, dtype=np.int64))
        if not summed.in_bytes:
            return False
        bytes_before = [len(text[:count].encode()) for count in range(len(text) + 1)]
        for (start, end), ours_start, ours_end in zip(
            real.offsets, summed.starts.tolist(), summed.ends.tolist(), strict=True
        ):
            # A part of a character is a whole one to the library.
            inside = bytes_before[start] <= ours_start <= ours_end <= bytes_before[end]
            if (start == end) != (ours_start == ours_end) or (start < end and not inside):
                return False
        return True

    def _without_places(self, text: str, add_special_tokens: bool) -> EncodedWithoutPlaces:
        def prefix(part: str) -> list[int]:
            return self.ids(part, add_special_tokens=add_special_tokens)

        return EncodedWithoutPlaces(text, np.array(prefix(text), dtype=np.int64), prefix)


def unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token for text that the vocabulary lacks; None if it lacks none, or if that token also begins or ends texts.

    GPT-2's vocabulary knows every byte, and its `unk_token` is the token that ends a text. A padding token that is the same one
    changes nothing: rows hold no padding yet.
    """
    token: int | None = tokenizer.unk_token_id
    if token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (_settings(backend.decoder) or {}).get("type") == "ByteLevel":
        from tokenizers import pre_tokenizers

        if set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys():
            return None
    return token


def _settings(part: Any) -> Any:
    """What a part of the library's tokenizer says of itself; None for one that is not there."""
    return None if part is None else json.loads(part.__getstate__())


def _trims(post_processor: Any) -> bool:
    """Whether a post-processor of the library takes spaces out of the places of tokens."""
    if post_processor is None:
        return False
    if post_processor.get("type") == "Sequence":
        return any(map(_trims, post_processor["processors"]))
    return bool(post_processor.get("trim_offsets", False))


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two rows share at their beginnings."""
    return next(
        (n for n, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), min(len(ids), len(others))
    )


def _from_offsets(text: str, one: Any) -> Encoded:
    places = np.array(one.offsets, dtype=np.int64).reshape(-1, 2)
    return Encoded(text, np.array(one.ids, dtype=np.int64), places[:, 0], places[:, 1], False)
