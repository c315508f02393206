"""Answers before and after training, paired up, the rows that changed first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sft_dist.report.text import mapping


@dataclass(frozen=True)
class Answer:
    """What one model said; None for a mark that the row does not carry."""

    text: str
    right: bool | None
    label: str | None
    label_right: bool | None


@dataclass(frozen=True)
class Sample:
    """One prompt with both answers; an answer is None if that side was not asked."""

    prompt: tuple[tuple[str, str], ...]  # role ("" for plain text) and content
    expected: str | None
    category: str | None
    before: Answer | None
    after: Answer | None
    set: str | None = None
    """The evaluation set that it is of."""

    @property
    def verdict(self) -> str:
        """How the row fared: `became wrong`, `became right`, `changed`, `stayed wrong`, `stayed right` or ``."""
        if self.before is None or self.after is None:
            return ""
        was, now = self.before.right, self.after.right
        if was is not None and now is not None and was != now:
            return "became right" if now else "became wrong"
        if (self.before.text, self.before.label) != (self.after.text, self.after.label):
            return "changed"
        return "" if now is None else "stayed right" if now else "stayed wrong"


# What went wrong comes before what went well: it is rarer, and it is what a reader must not miss.
ORDER = ("became wrong", "became right", "changed", "stayed wrong", "stayed right", "")


def pair_samples(
    before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]
) -> tuple[list[Sample], list[Sample]]:
    """The questions in the order asked, and the scored rows ordered by ORDER, then by index."""
    left, right = _keyed(before), _keyed(after)
    questions: list[Sample] = []
    scored: list[Sample] = []
    for key in {**left, **right}:
        row = right.get(key) or left[key]
        sample = Sample(
            prompt=_turns(row.get("prompt")),
            expected=None if row.get("expected") is None else _text(row["expected"]),
            category=None if row.get("category") is None else _text(row["category"]),
            before=_answer(left.get(key)),
            after=_answer(right.get(key)),
            set=None if row.get("set") is None else _text(row["set"]),
        )
        (scored if row.get("kind") == "scored" else questions).append(sample)
    return questions, sorted(scored, key=lambda sample: ORDER.index(sample.verdict))


def shared_system(samples: Iterable[Sample]) -> str | None:
    """The system message if all samples have the same one, else None."""
    heads = {sample.prompt[0] if sample.prompt else ("", "") for sample in samples}
    role, text = heads.pop() if len(heads) == 1 else ("", "")
    return text if role == "system" else None


def _keyed(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows by what they asked: the same index with another prompt is another row; repeats are counted."""
    seen: Counter[tuple[Any, ...]] = Counter()
    keyed = {}
    for row in rows:
        key = tuple(json.dumps(row.get(field), sort_keys=True) for field in ("kind", "index", "prompt"))
        keyed[(*key, seen[key])] = row
        seen[key] += 1
    return keyed


def _answer(row: dict[str, Any] | None) -> Answer | None:
    if row is None:
        return None
    label = row.get("predicted_label")
    return Answer(
        text=_text(row.get("answer")),
        right=_mark(row.get("exact_match")),
        label=None if label is None else _text(label),
        label_right=_mark(row.get("label_correct")),
    )


def _mark(value: Any) -> bool | None:
    return bool(value) if isinstance(value, (bool, int, float)) else None


def _turns(prompt: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(prompt, list):
        return (("", _text(prompt)),)
    turns = [mapping(message) or {"content": message} for message in prompt]
    return tuple((_text(turn.get("role")), _text(turn.get("content", turn))) for turn in turns)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
