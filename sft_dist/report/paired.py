"""Tuned models of several runs on the rows that they were all asked: what differs, and whether that is chance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sft_dist.report.config_text import config_list
from sft_dist.report.facts import RunFacts
from sft_dist.report.page import Table
from sft_dist.report.scores import MAX_NAME, Cell, score_lines
from sft_dist.report.text import clip, mapping, number, plain

Rows = dict[str, dict[str, Any]]


def paired(names: Sequence[str], facts: Sequence[RunFacts]) -> tuple[list[str], list[Table]]:
    """Where runs were asked other rows under the name of a set, and of each set a table of the tuned models against the first run's."""
    notices: list[str] = []
    tables: list[Table] = []
    asked = [_asked(one) for one in facts]
    for name, first in asked[0].items():
        lines: list[list[str]] = []
        for other, rows in zip(names[1:], asked[1:], strict=True):
            theirs = rows.get(name)
            if theirs is None:
                continue
            common = [key for key in first if key in theirs]
            if len(common) < max(len(first), len(theirs)):
                notices.append(
                    f"{clip(name, MAX_NAME)}: {plain(len(common))} rows are those of both {names[0]} ({plain(len(first))}) and {other} "
                    f"({plain(len(theirs))}); the scores above are of different questions"
                )
            tasks = config_list(facts[0].config_text, "evaluate", "harness", "tasks")
            part = _against([first[key] for key in common], [theirs[key] for key in common], task=name in tasks)
            lines += [[line.title, other, plain(line.n), *map(_text, (line.before, line.after, line.change)), line.p_value]
                      for line in score_lines(part, of_category=0)]  # fmt: skip
        if lines:
            head = ["Score", "Run", "Rows of both", names[0], "this run", "difference", "p"]
            tables.append((f"{clip(name, MAX_NAME)}: tuned models against that of {names[0]}, row by row", head, lines))
    return notices, tables


def _against(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], *, task: bool) -> dict[str, Any]:
    """A set's part as in scores.json, with one tuned model as `before` and another as `after`; {} for rows that do not fit together."""
    from sft_dist.evaluate.metrics import OURS, TASKS
    from sft_dist.evaluate.summary import set_scores

    shared = {name for row in one for name in row["scores"]} & {name for row in other for name in row["scores"]}
    sides = [
        [{**row, "index": place, "scores": {key: it for key, it in row["scores"].items() if key in shared}}
         for place, row in enumerate(rows)]
        for rows in (one, other)
    ]  # fmt: skip
    try:
        return set_scores(None, sides[0], sides[1], TASKS if task else OURS) if shared else {}
    except (ValueError, TypeError, IndexError, ImportError):  # damaged counts, or a metric's package that is not here
        return {}


def _asked(facts: RunFacts) -> dict[str, Rows]:
    """The scored rows of the tuned model by set, and by what was asked and expected, since an index may mean another row elsewhere."""
    sets: dict[str, Rows] = {}
    for name, key, row in _scored(facts.after):
        sets.setdefault(name, {})[key] = row
    return sets


def _scored(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        scores = {name: value for name, it in mapping(row.get("scores")).items() if (value := number(it)) is not None}
        if row.get("kind") != "scored" or not scores:
            continue
        name = plain(row.get("set", "data"))
        key = json.dumps([row.get("prompt"), row.get("expected")], sort_keys=True)
        seen[name, key] += 1  # the same question twice is two rows
        kept = {"scores": scores, "category": None, "expected": row.get("expected"), "answer": row.get("answer")}
        if counts := mapping(row.get("counts")):
            kept["counts"] = counts
        yield name, f"{seen[name, key]} {key}", kept


def _text(cell: Cell) -> str:
    return f"{cell.text} {cell.interval}".rstrip()
