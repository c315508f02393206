"""The scores of a set before and after training: how sure they are, what changed most, and whether that is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sft_dist.evaluate.intervals import Array, interval, paired_test, resample
from sft_dist.evaluate.metrics import OURS, Meaning

Row = dict[str, Any]
# Rows shown of those that gained and of those that lost most.
SHOWN = 5


def set_scores(
    first: str | None, before: Sequence[Row], after: Sequence[Row], meaning: Meaning = OURS
) -> dict[str, Any]:
    """A set's part of scores.json, from the rows of one model or of both; `first` is its first score, if the rows have it.

    `scores` and `by_category` hold for each score its unit, the value `before` and `after` with their 95 % intervals, and,
    with both models, the `change` with its interval, the paired `test` and its `p_value`. `gains` and `losses` are the
    rows that changed most in the set's first score.
    """
    sides = {when: {row["index"]: row for row in rows} for when, rows in (("before", before), ("after", after)) if rows}
    indices = sorted(set.intersection(*(set(rows) for rows in sides.values()))) if sides else []
    chosen = {when: [rows[index] for index in indices] for when, rows in sides.items()}
    # A function of the user's own may have given other names than its own.
    names = dict.fromkeys(name for rows in chosen.values() for row in rows for name in row["scores"])
    if first is None or (names and first not in names):
        first = next(iter(names), "")
    categories: dict[str, list[int]] = {}
    for place in range(len(indices)):
        category = next(iter(chosen.values()))[place].get("category")
        if category is not None:
            categories.setdefault(str(category), []).append(place)
    scores: dict[str, Any] = {"n": len(indices), "first": first, "scores": _scores(chosen, meaning)}
    scores["by_category"] = {
        name: {
            "n": len(places),
            "scores": _scores({when: [rows[i] for i in places] for when, rows in chosen.items()}, meaning),
        }
        for name, places in sorted(categories.items())
    }
    if len(chosen) == 2:
        scores |= _largest(chosen["before"], chosen["after"], first, 1.0 if meaning.higher_is_better(first) else -1.0)
    return scores


def _scores(sides: dict[str, list[Row]], meaning: Meaning) -> dict[str, Any]:
    names = list(dict.fromkeys(name for rows in sides.values() for row in rows for name in row["scores"]))
    if not names:
        return {}
    columns = {(when, name): counts_of(rows, name) for when, rows in sides.items() for name in names}
    ends = np.cumsum([part.shape[1] for part in columns.values()])
    drawn = resample(np.hstack(list(columns.values())))
    sums = dict(zip(columns, np.split(drawn, ends[:-1], axis=1), strict=True))
    return {
        name: _one_score(name, {when: (columns[when, name], sums[when, name]) for when in sides}, meaning)
        for name in names
    }


def _one_score(name: str, sides: dict[str, tuple[Array, Array]], meaning: Meaning) -> dict[str, Any]:
    reduce = meaning.reduction(name)
    part: dict[str, Any] = {"unit": meaning.unit(name), "higher_is_better": meaning.higher_is_better(name)}
    values, draws = {}, {}
    for when, (rows, sums) in sides.items():
        values[when], draws[when] = float(reduce(rows.sum(0))), reduce(sums)
        part[when] = _rounded(values[when])
        part[f"{when}_interval"] = _rounded_pair(interval(draws[when]))
    if len(sides) == 2:
        test, p_value = paired_test(sides["before"][0], sides["after"][0], reduce)
        part["change"] = _rounded(values["after"] - values["before"])
        part["change_interval"] = _rounded_pair(interval(draws["after"] - draws["before"]))
        part |= {"test": test, "p_value": p_value}
    return part


def counts_of(rows: Sequence[Row], name: str) -> Array:
    """[rows, counts]: what the score sums over rows; zeros for a row that has nothing to score."""
    found = []
    for row in rows:
        value = row["scores"].get(name)
        found.append(row.get("counts", {}).get(name) or ([] if value is None else [float(value), 1.0]))
    width = max(map(len, found), default=2) or 2
    return np.asarray([counts or [0.0] * width for counts in found], dtype=np.float64)


def _largest(before: Sequence[Row], after: Sequence[Row], first: str, sign: float) -> dict[str, list[dict[str, Any]]]:
    changes = []
    for was, now in zip(before, after, strict=True):
        old, new = was["scores"].get(first), now["scores"].get(first)
        if old is not None and new is not None and old != new:
            shown = {name: now[name] for name in ("index", "category", "expected")}
            shown |= {"before": was["answer"], "after": now["answer"], "score_before": old, "score_after": new}
            changes.append((sign * (new - old), shown))
    changes.sort(key=lambda change: (-change[0], change[1]["index"]))
    gains = [shown for change, shown in changes if change > 0]
    losses = [shown for change, shown in reversed(changes) if change < 0]
    return {"gains": gains[:SHOWN], "losses": losses[:SHOWN]}


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _rounded_pair(pair: tuple[float, float] | None) -> list[float | None] | None:
    return None if pair is None else [_rounded(value) for value in pair]
