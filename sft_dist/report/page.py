"""report.html: what a run did and learned, in one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import shlex
import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sft_dist import __version__
from sft_dist.files import moment, utc_now, write_text
from sft_dist.report.config_text import config_value, marked_lines
from sft_dist.report.curve import draw
from sft_dist.report.facts import RunFacts, read_facts, wall_seconds
from sft_dist.report.samples import ORDER, Sample, pair_samples, shared_system
from sft_dist.report.scores import ScoreRow, score_rows
from sft_dist.report.text import (
    clip,
    clock,
    duration,
    flatten,
    number,
    percent,
    plain,
    points,
    visible,
)
from sft_dist.rundir import RunDir

MAX_SAMPLES = 30
MAX_CHARACTERS = 4000  # of one text in a sample

Table = tuple[str, list[str], list[list[str]]]  # caption, head, rows


def write_report(run: RunDir) -> Path:
    """Write report.html from what the run directory holds now, and return its path.

    Works for a run in any state. Raises SftDistError if there is no such directory.
    """
    write_text(run.report, render(read_facts(run)))
    return run.report


def render(facts: RunFacts) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sft_dist", "resources/html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every value passes here before it is escaped, so no place in the template can forget it.
        finalize=_shown,
    )
    environment.filters.update(
        percent=percent, points=points, plain=plain, clip=lambda text: clip(text, MAX_CHARACTERS)
    )
    return environment.get_template("report.html.j2").render(_view(facts))


def _shown(value: Any) -> Any:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else visible(str(value))


def _view(facts: RunFacts) -> dict[str, Any]:
    from markupsafe import Markup

    style, script = (_resource(name) for name in ("report.css", "report.js"))
    questions, scored = pair_samples(facts.before, facts.after)
    metrics, rows = score_rows(facts.scores)
    lines = marked_lines(facts.config_text, facts.provenance) if facts.config_text.strip() else []
    return {
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'",
        "name": facts.name,
        "state": facts.status.get("state", "unknown"),
        "notices": _notices(facts),
        "headline": _headline(metrics, rows),
        "tiles": _tiles(facts),
        "metrics": metrics,
        "score_rows": rows,
        "curve": draw(facts.metrics),
        "questions": questions[:MAX_SAMPLES],
        "more_questions": max(0, len(questions) - MAX_SAMPLES),
        "scored": scored[:MAX_SAMPLES],
        "more_scored": max(0, len(scored) - MAX_SAMPLES),
        "verdicts": _verdicts(scored),
        "system": shared_system([*questions[:MAX_SAMPLES], *scored[:MAX_SAMPLES]]),
        "ledger": _columns(facts.ledger),
        "config": lines,
        "config_marked": sum(bool(source) for _, source in lines),
        "provenance_known": bool(facts.provenance),
        "decisions": _decisions(facts.env),
        "environment": _environment(facts.env),
        "attempts": _attempts(facts.attempts),
        "version": __version__,
        "written": clock(utc_now()),
    }


def _resource(name: str) -> str:
    return (resources.files("sft_dist") / "resources" / "html" / name).read_text(encoding="utf-8").strip()


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


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


def _headline(metrics: Sequence[str], rows: Sequence[ScoreRow]) -> dict[str, Any] | None:
    """The first metric over all rows, before and after."""
    if not rows or rows[0].pairs[0] == (None, None):
        return None
    before, after = rows[0].pairs[0]
    return {"metric": metrics[0], "before": before, "after": after, "n": rows[0].n}


def _tiles(facts: RunFacts) -> list[tuple[str, str]]:
    """The run in a few figures; those that nothing says are left out."""
    logged = [int(step) for row in facts.metrics if (step := number(row.get("step"))) is not None]
    step = number(facts.status.get("step")) if "step" in facts.status else (logged[-1] if logged else None)
    most = number(facts.status.get("max_steps"))
    seconds = wall_seconds(facts)
    speeds = [speed for row in facts.metrics if (speed := number(row.get("tokens_per_s"))) is not None]
    tokens = [count for row in facts.metrics if (count := number(row.get("tokens"))) is not None]
    model = config_value(facts.config_text, "model", "name")
    tiles = [
        ("Model", model and clip(model, 200)),
        ("Steps", step is not None and plain(int(step)) + (f" of {plain(int(most))}" if most is not None else "")),
        ("Wall time", seconds is not None and duration(seconds)),
        ("Tokens", tokens and plain(int(max(tokens)))),
        ("Median tokens/s", speeds and plain(statistics.median(speeds))),
    ]
    return [(title, value) for title, value in tiles if isinstance(value, str)]


def _verdicts(scored: Sequence[Sample]) -> list[tuple[str, int]]:
    counts = [(verdict, sum(sample.verdict == verdict for sample in scored)) for verdict in ORDER if verdict]
    return [(verdict, count) for verdict, count in counts if count]


def _columns(tree: dict[str, Any]) -> Table | None:
    """A dict of dicts as one table: a column for each part, a row for each field that any part has."""
    if not tree:
        return None
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
