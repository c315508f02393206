"""report.html: what a run did and learned, in one file that needs nothing else."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_dist.files import moment, write_text
from sft_dist.report.config_text import config_value, marked_lines
from sft_dist.report.curve import OTHERS, draw
from sft_dist.report.facts import RunFacts, read_facts, wall_seconds
from sft_dist.report.html import MAX_CHARACTERS, render_page
from sft_dist.report.reproduce import defaults, reproduction
from sft_dist.report.samples import ORDER, Sample, pair_samples, shared_system
from sft_dist.report.scores import ScoreLine, asked_while_training, score_lines, sets_of
from sft_dist.report.text import (
    clip,
    clock,
    duration,
    flatten,
    mapping,
    number,
    plain,
)
from sft_dist.report.timeline import timeline
from sft_dist.rundir import RunDir

MAX_SAMPLES = 30
MAX_SETS = 20
# Numbers of a source that stand in ledger.json only.
NOT_BY_SOURCE = {
    *("dropped_bad_rows", "dropped_share", "answers_cut_or_lost", "turns", "unknown_tokens", "unknown_texts"),
    *("special_texts", "tokens_in", "lost_tokens", "held_out_tokens", "length_percentiles", "duplicates_share"),
}

Table = tuple[str, list[str], list[list[str]]]  # caption, head, rows


def write_report(run: RunDir) -> Path:
    """Write report.html from what the run directory holds now, and return its path.

    Works for a run in any state. Raises SftDistError if there is no such directory.
    """
    write_text(run.report, render(read_facts(run)))
    return run.report


def render(facts: RunFacts) -> str:
    """The page as HTML."""
    return render_page("report.html.j2", _view(facts))


def _view(facts: RunFacts) -> dict[str, Any]:
    questions, scored = pair_samples(facts.before, facts.after)
    others = (*OTHERS, *asked_while_training(facts.metrics)[:MAX_SETS])
    sets = [score_set(name, part) for name, part in sets_of(facts.scores)[:MAX_SETS]]
    lines = marked_lines(facts.config_text, facts.provenance, defaults()) if facts.config_text.strip() else []
    return {
        "name": facts.name,
        "state": facts.status.get("state", "unknown"),
        "notices": _notices(facts),
        "headline": next((_headline(lines[0]) for _, lines, _ in sets if lines), None),
        "tiles": _tiles(facts),
        "sets": sets,
        "curve": draw(facts.metrics),
        "others": [found for one in others if (found := draw(facts.metrics, (one,))) is not None],
        "questions": questions[:MAX_SAMPLES],
        "more_questions": max(0, len(questions) - MAX_SAMPLES),
        "scored": scored[:MAX_SAMPLES],
        "more_scored": max(0, len(scored) - MAX_SAMPLES),
        "verdicts": _verdicts(scored),
        "system": shared_system([*questions[:MAX_SAMPLES], *scored[:MAX_SAMPLES]]),
        "ledger": _ledger(facts.ledger),
        "config": lines,
        "config_marked": sum(bool(source) for _, source in lines),
        "provenance_known": bool(facts.provenance),
        "decisions": _decisions(facts.env),
        "environment": _environment(facts.env),
        "attempts": _attempts(facts.attempts),
        "timeline": timeline(facts),
        "reproduction": reproduction(facts),
    }


def _notices(facts: RunFacts) -> list[str]:
    """What a reader must know before the numbers: why the run ended early, and what could not be read."""
    state, reason = facts.status.get("state"), facts.status.get("reason")
    notices = []
    if state == "stopped":
        why = f" ({plain(reason)})" if reason else ""
        notices.append(f"The run stopped early{why}. Go on with: sft-dist resume {shlex.quote(facts.name)}")
    elif state == "failed":
        notices.append(f"The run failed: {plain(reason)}" if reason else "The run failed.")
    elif state in ("queued", "running"):
        notices.append(f"The run was {state} when this report was written.")
    return [clip(notice, MAX_CHARACTERS) for notice in (*notices, *facts.problems)]


def score_set(name: str, part: dict[str, Any]) -> tuple[str, list[ScoreLine], list[tuple[str, list[list[str]]]]]:
    """A set's name, its lines, and the rows that gained and that lost most: category, expected, before, after."""
    changed = []
    for title, key in (("Largest gains", "gains"), ("Largest losses", "losses")):
        rows = [mapping(row) for row in part.get(key) or ()] if isinstance(part.get(key), list) else []
        cells = [[_cell(row, field) for field in ("index", "category", "expected", "before", "after")] for row in rows]
        if cells:
            changed.append((title, cells))
    return clip(name, MAX_CHARACTERS), score_lines(part, of_category=2), changed


def _headline(line: ScoreLine) -> dict[str, Any]:
    """The first score over all rows, before and after."""
    return {"metric": line.title, "line": line, "shares": line.shares}


def _tiles(facts: RunFacts) -> list[tuple[str, str]]:
    """The run in a few figures; those that nothing says are left out."""
    step, most = facts.step, number(facts.status.get("max_steps"))
    seconds = wall_seconds(facts)
    speeds = [speed for row in facts.metrics if (speed := number(row.get("tokens_per_s"))) is not None]
    tokens = [count for row in facts.metrics if (count := number(row.get("tokens"))) is not None]
    model = config_value(facts.config_text, "model", "name")
    tiles = [
        ("Model", model and clip(model, 200)),
        ("Steps", step is not None and plain(step) + (f" of {plain(int(most))}" if most is not None else "")),
        ("Wall time", seconds is not None and duration(seconds)),
        ("Tokens", tokens and plain(int(max(tokens)))),
        ("Median tokens/s", speeds and plain(statistics.median(speeds))),
    ]
    return [(title, value) for title, value in tiles if isinstance(value, str)]


def _verdicts(scored: Sequence[Sample]) -> list[tuple[str, int]]:
    counts = [(verdict, sum(sample.verdict == verdict for sample in scored)) for verdict in ORDER if verdict]
    return [(verdict, count) for verdict, count in counts if count]


def _ledger(ledger: dict[str, Any]) -> list[Table]:
    """The ledger's numbers with a column for each split, then of each split a line for each source."""
    splits = {name: part for name, part in ledger.items() if isinstance(part, dict) and _lines(part.get("sources"))}
    rest = {name: {key: it for key, it in part.items() if key != "sources"} for name, part in splits.items()}
    tables = [_columns({**ledger, **rest})] if ledger else []
    for name, part in splits.items():
        sources = part["sources"]
        # A line must fit on a page: what no source has any of is left out, and what others say nearly as well.
        every = dict.fromkeys(field for source in sources for field in source if field not in NOT_BY_SOURCE)
        fields = [field for field in every if any(source.get(field) not in (0, {}, None) for source in sources)]
        lines = [[_counts(source[field]) if field in source else "" for field in fields] for source in sources]
        tables.append((f"Sources: {name}", [field.replace("_", " ") for field in fields], lines))
    return tables


def _lines(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _counts(value: Any) -> str:
    """A dict of plain values on one line, others as everywhere."""
    if isinstance(value, dict) and not any(isinstance(item, (dict, list)) for item in value.values()):
        value = [f"{key.replace('_', ' ')} {plain(item)}" for key, item in value.items()]
    return clip(plain(value), MAX_CHARACTERS)


def _columns(tree: dict[str, Any]) -> Table:
    """A dict of dicts as one table: a column for each part, a row for each field that any part has."""
    parts = {key: flatten(value) for key, value in tree.items() if isinstance(value, dict)}
    whole = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    if whole:
        parts = {**parts, "": whole}
    fields = dict.fromkeys(field for part in parts.values() for field in part)
    rows = [[field.replace("_", " "), *(_cell(part, field) for part in parts.values())] for field in fields]
    return "", ["", *parts], rows


def _cell(row: dict[str, Any], field: str) -> str:
    return clip(plain(row[field]), MAX_CHARACTERS) if field in row else ""


def _decisions(env: dict[str, Any]) -> list[str]:
    found = env.get("decisions")
    return [clip(plain(decision), MAX_CHARACTERS) for decision in found] if isinstance(found, list) else []


def _environment(env: dict[str, Any]) -> list[Table]:
    """A table of the plain values, then one for each group."""
    rest = {key: value for key, value in env.items() if key != "decisions"}
    groups = {"Machine": {key: value for key, value in rest.items() if not isinstance(value, dict)}}
    groups |= {key.capitalize(): flatten(value) for key, value in rest.items() if isinstance(value, dict)}
    return [
        (title, [], [[key.replace("_", " "), _cell(group, key)] for key in group])
        for title, group in groups.items()
        if group
    ]


def _attempts(attempts: Sequence[dict[str, Any]]) -> Table | None:
    """One line an attempt: the fields as they stand, times made readable, and how long it took."""
    if not attempts:
        return None
    fields = list(dict.fromkeys(field for attempt in attempts for field in attempt))
    rows = []
    for attempt in attempts:
        start, end = moment(attempt.get("start")), moment(attempt.get("end"))
        took = duration((end - start).total_seconds()) if start and end else ""
        cells = [clock(attempt[f]) if f in ("start", "end") and f in attempt else _cell(attempt, f) for f in fields]
        rows.append([*cells, took])
    return "", [*(field.replace("_", " ") for field in fields), "took"], rows
