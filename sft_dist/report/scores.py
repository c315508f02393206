"""Scores before and after, as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft_dist.report.text import mapping, number

METRICS = (("Exact match", "exact_match"), ("Label accuracy", "label_accuracy"))


@dataclass(frozen=True)
class ScoreRow:
    """One line: `pairs` holds (before, after) of each metric, as shares of 1 or None."""

    name: str
    n: int | None
    pairs: tuple[tuple[float | None, float | None], ...]


def score_rows(scores: dict[str, Any]) -> tuple[list[str], list[ScoreRow]]:
    """The metrics that have a value, and a row for all, then one for each category by name; ([], []) without scores."""
    before, after = mapping(scores.get("before")), mapping(scores.get("after"))
    parts = {"": (before, after)}
    old, new = mapping(before.get("by_category")), mapping(after.get("by_category"))
    for category in sorted({**old, **new}):
        parts[category] = (mapping(old.get(category)), mapping(new.get(category)))
    metrics = [
        (title, key)
        for title, key in METRICS
        if any(number(side.get(key)) is not None for pair in parts.values() for side in pair)
    ]
    if not metrics:
        return [], []
    rows = []
    for category, (was, now) in parts.items():
        n = number(now.get("n", was.get("n", None if category else scores.get("n"))))
        pairs = tuple((number(was.get(key)), number(now.get(key))) for _, key in metrics)
        rows.append(ScoreRow(category or "All rows", None if n is None else int(n), pairs))
    return [title for title, _ in metrics], rows
