"""Texts -> token ids by way of the pieces between spaces, each of which the library tokenises once.

A byte-level tokenizer first cuts a text by a regular expression and then makes tokens of each part alone. No part that the
expressions below find reaches over a space that follows something else than white space: they match white space, or have a
space at their very beginning. So the tokens of a text are those of its pieces, cut before such spaces, one after the other,
and most pieces are words that came before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
# How the byte-level tokenizers of chat models cut a text, besides GPT-2's way, which the library has built in.
EXPRESSIONS = frozenset(
    expression
    for number in (r"\p{N}", r"\p{N}{1,3}")
    for expression in (
        rf"{_ENDINGS}|{_BEFORE}\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
        rf"{_ENDINGS}|{_BEFORE}[\p{{L}}\p{{M}}]+|{number}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}",
        *(
            rf"{_BEFORE}{_UPPER}*{_LOWER}+{ending}|{_BEFORE}{_UPPER}+{_LOWER}*{ending}"
            rf"|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
            for ending in ("", f"{_ENDINGS}?")
        ),
    )
)
# A run of what is no space, and the spaces before it.
_WORD = re.compile(r" *[^ ]+| +")
# Pieces that are remembered; about 200 bytes each.
REMEMBERED = 100_000
# Longer ones hardly come again.
LONGEST = 64


class Pieces:
    """Tokenises texts with a tokenizer of the library for which `cut_at_spaces` holds."""

    def __init__(self, backend: Any, size: NDArray[np.int64]) -> None:
        """`size`: of each token by its id, the bytes that it stands for."""
        self._backend, self._size = backend, size
        self._words: dict[str, bytes] = {}
        """Words, with the spaces before them, whose last sign ends a part -> ids (int32)."""
        self._others: dict[str, bytes] = {}
        """All other pieces, as they stand in the text -> ids."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text, without special tokens around it."""
        for known in (self._words, self._others):
            if len(known) > REMEMBERED:
                known.clear()
        rows = [self._looked_up(_WORD.findall(text)) for text in texts]
        made = self._made([list(missing.values()) for _, missing in rows if missing])
        for row, missing in rows:
            for at, piece in missing.items():
                row[at] = made[piece]
        return [np.frombuffer(b"".join(row), dtype=np.int32).astype(np.int64) for row, _ in rows]

    def _looked_up(self, words: list[str]) -> tuple[list[bytes], dict[int, str]]:
        """The ids of the text that `words` are together; and where in these others belong, of which pieces."""
        found: list[Any] = list(map(self._words.get, words))
        row: list[bytes] = []
        missing: dict[int, str] = {}
        end = 0
        for at in [at for at, ids in enumerate(found) if ids is None]:
            if at < end:
                continue
            row += found[end:at]
            end = at + 1
            while end < len(words) and not _ends_a_part(words[end - 1]):
                end += 1
            piece = "".join(words[at:end])
            ids = self._others.get(piece)
            if ids is None:
                missing[len(row)] = piece
            row.append(ids or b"")
        return row + found[end:], missing

    def _made(self, rows: Sequence[Sequence[str]]) -> dict[str, bytes]:
        """The ids of pieces: of those that stand in one text, in the order in which they stand there."""
        made: dict[str, bytes] = {}
        groups = []
        for row in rows:
            group = [piece for piece in dict.fromkeys(row) if piece not in made]
            made |= dict.fromkeys(group, b"")
            if group:
                groups.append(group)
        # What held for the whole text holds for its pieces, put one after the other without those in between.
        encoded = self._backend.encode_batch_fast(["".join(group) for group in groups], add_special_tokens=False)
        for group, one in zip(groups, encoded, strict=True):
            made |= zip(group, self._apart(group, np.array(one.ids, dtype=np.int32)), strict=True)
        for piece, ids in made.items():
            if len(piece) > LONGEST:
                continue
            alone = " " not in piece.lstrip(" ") and _ends_a_part(piece)
            (self._words if alone else self._others)[piece] = ids
        return made

    def _apart(self, group: Sequence[str], ids: NDArray[np.int32]) -> list[bytes]:
        """The ids of each piece, from those of the pieces together."""
        if len(group) == 1:
            return [ids.tobytes()]
        ends = np.cumsum([len(piece) if piece.isascii() else len(piece.encode()) for piece in group])
        spelled = np.cumsum(self._size[ids])
        cuts = np.searchsorted(spelled, ends)
        if cuts[-1] == len(ids) - 1 and np.array_equal(spelled[cuts], ends):
            return [part.tobytes() for part in np.split(ids, cuts[:-1] + 1)]
        # The text was brought into another form, of another length.
        encoded = self._backend.encode_batch_fast(list(group), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32).tobytes() for one in encoded]


def _ends_a_part(word: str) -> bool:
    """Whether `word` ends with something that no tokenizer takes for white space, so that a part ends with it before a space."""
    return word != "" and ("!" <= word[-1] <= "~" or word[-1].isalnum())


def cut_at_spaces(backend: Any, added: Iterable[Any]) -> bool:
    """Whether the tokens of a text are those of its pieces, for a tokenizer of the library that knows the tokens `added`.

    What it does to the text before that must change no space: none, or bringing it into Unicode's composed form.
    """
    if type(backend.model).__name__ != "BPE" or backend.model.dropout is not None or backend.pre_tokenizer is None:
        return False
    if any(" " in token.content or token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    settings = json.loads(backend.pre_tokenizer.__getstate__())
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    return any(map(_cuts, steps)) and all(_cuts(step) or _only_cuts_more(step) for step in steps)


def _cuts(step: dict[str, Any]) -> bool:
    """Whether a step of cutting leaves no part that reaches over such a space."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"]) and not step["add_prefix_space"]
    plain = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return plain and step["pattern"].get("Regex") in EXPRESSIONS


def _only_cuts_more(step: dict[str, Any]) -> bool:
    return step["type"] == "Digits" or (step["type"] == "ByteLevel" and not step["add_prefix_space"])
