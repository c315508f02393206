"""Scores of answers against what was expected, in all and by category."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact_match(answer: str, expected: str) -> bool:
    """Whether the answer is the expected text, white space at the ends aside."""
    return answer.strip() == expected.strip()


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers over `rows` of kind `scored`: exact_match, label_accuracy (None without labels), and
    both by category with the number of rows `n`."""
    scored = [row for row in rows if row["kind"] == "scored"]
    categories = sorted({str(row["category"]) for row in scored if row["category"] is not None})
    return {
        **_shares(scored),
        "by_category": {
            name: {"n": len(chosen), **_shares(chosen)}
            for name in categories
            if (chosen := [row for row in scored if str(row["category"]) == name])
        },
    }


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    labelled = [row["label_correct"] for row in rows if row["label_correct"] is not None]
    return {
        "exact_match": _mean([row["exact_match"] for row in rows]),
        "label_accuracy": _mean(labelled),
    }


def _mean(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None
