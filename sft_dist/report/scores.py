"""The scores of a run's evaluation sets before and after, as lines of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sft_dist.report.text import NONE, clip, mapping, number, visible

NAMES = {
    "exact": "exact match",
    "contains": "expected text in it",
    "numeric": "last number right",
    "json_all": "JSON, all fields",
    "json_valid": "JSON, valid",
    "json_fields": "JSON, fields right",
    "fields_all": "all fields",
    "fields": "fields right",
    "label": "likeliest label right",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
}
MAX_NAME = 40
# The set that stands for evaluate.data.
MAIN_SET = "data"
# How keys of metrics.jsonl begin that hold scores of a set.
ASKED = "eval_"
# What the scores of versions before there were sets are called now.
_OLDER = {"exact_match": "exact", "label_accuracy": "label"}


@dataclass(frozen=True)
class Cell:
    """A value as it is shown, and its interval in brackets, empty where there is none."""

    text: str = NONE
    interval: str = ""


@dataclass(frozen=True)
class ScoreLine:
    """One score over all rows of a set, or over those of a category."""

    score: str
    category: str | None
    n: int | None
    before: Cell
    after: Cell
    change: Cell
    p_value: str
    shares: tuple[float, float] | None
    """Before and after, for a score that is a share of 1 and has both."""

    @property
    def title(self) -> str:
        """The score's name where a line begins with it."""
        return self.score[:1].upper() + self.score[1:]


def sets_of(scores: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and part of each set in scores.json that has scores, evaluate.data's first."""
    sets = {str(name): mapping(part) for name, part in mapping(scores.get("sets")).items()}
    if not sets and (older := _older(scores)):
        sets = {MAIN_SET: older}
    found = [(name, part) for name, part in sets.items() if mapping(part.get("scores"))]
    return sorted(found, key=lambda item: item[0] != MAIN_SET)


def score_lines(part: dict[str, Any], of_category: int = 1) -> list[ScoreLine]:
    """Each score over all rows, the set's first score first, then the first `of_category` of them in each category."""
    first = str(part.get("first"))
    scores = mapping(part.get("scores"))
    keys = sorted(map(str, scores), key=lambda key: key != first)
    lines = [_line(key, None, part, mapping(scores.get(key))) for key in keys]
    for category, inside in mapping(part.get("by_category")).items():
        inside = mapping(inside)
        known = mapping(inside.get("scores"))
        for key in keys[:of_category]:
            lines.append(_line(key, visible(clip(str(category), MAX_NAME)), inside, mapping(known.get(key))))
    return lines


def asked_while_training(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Title and key in metrics.jsonl of each score that `evaluate.during` has put there."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(ASKED) and "/" in key)
    parts = sorted((*key.removeprefix(ASKED).split("/", 1), key) for key in keys)
    found = []
    for name, score, key in sorted(parts, key=lambda part: part[0] != MAIN_SET):
        if score != "n":
            title = NAMES.get(score, score)
            found.append((visible(clip(f"{title[:1].upper()}{title[1:]}, {name}", 2 * MAX_NAME)), key))
    return found


def _line(key: str, category: str | None, part: dict[str, Any], score: dict[str, Any]) -> ScoreLine:
    unit, p_value, n = score.get("unit"), number(score.get("p_value")), number(part.get("n"))
    values = {name: number(score.get(name)) for name in ("before", "after", "change")}
    before, after, change = (
        Cell(_value(value, unit, signed=name == "change"), _interval(score.get(f"{name}_interval"), unit))
        for name, value in values.items()
    )
    was, now = values["before"], values["after"]
    return ScoreLine(
        NAMES.get(key) or visible(clip(key, MAX_NAME)),
        category,
        None if n is None else int(n),
        before,
        after,
        change,
        NONE if p_value is None else "<0.0001" if p_value < 0.0001 else f"{p_value:.2g}",
        (was, now) if unit == "share" and was is not None and now is not None else None,
    )


def _value(value: float | None, unit: Any, *, signed: bool = False) -> str:
    if value is None:
        return NONE
    sign = "+" if signed else ""
    if unit == "share":
        return f"{100 * value:{sign}.1f}" + ("" if signed else "%")
    return f"{value:{sign}.1f}" if unit == "points" else f"{value:{sign}.3g}"


def _interval(span: Any, unit: Any) -> str:
    ends = [number(value) for value in span] if isinstance(span, list) and len(span) == 2 else [None]
    if None in ends:
        return ""
    return f"[{', '.join(_value(end, unit).rstrip('%') for end in ends)}]"


def _older(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores without sets as those of one set; {} if there are none."""
    sides = {when: mapping(scores.get(when)) for when in ("before", "after")}
    found = {key: dict(_both(sides, old)) for old, key in _OLDER.items()}
    known = {key: score for key, score in found.items() if "before" in score or "after" in score}
    if not known:
        return {}
    inside = {when: mapping(side.get("by_category")) for when, side in sides.items()}
    categories: dict[str, Any] = {}
    for category in sorted({str(name) for side in inside.values() for name in side}):
        there = {when: mapping(side.get(category)) for when, side in inside.items()}
        shares = {_OLDER[old]: dict(_both(there, old)) for old in _OLDER if _OLDER[old] in known}
        categories[category] = {"n": there["after"].get("n", there["before"].get("n")), "scores": shares}
    return {"n": scores.get("n"), "first": next(iter(known), None), "scores": known, "by_category": categories}


def _both(sides: dict[str, dict[str, Any]], key: str) -> Iterator[tuple[str, Any]]:
    yield "unit", "share"
    values = {when: value for when, side in sides.items() if (value := number(side.get(key))) is not None}
    yield from values.items()
    if len(values) == 2:
        yield "change", values["after"] - values["before"]
