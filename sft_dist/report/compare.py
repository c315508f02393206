"""Several runs side by side: what was set differently, what came of it, their curves; and a page that lists all runs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sft_dist.errors import ConfigError
from sft_dist.files import moment, write_text
from sft_dist.report.config_text import config_value, flat_values
from sft_dist.report.curve import Curve, draw_together, series
from sft_dist.report.facts import RunFacts, read_facts, wall_seconds
from sft_dist.report.html import MAX_CHARACTERS, render_page
from sft_dist.report.page import Table
from sft_dist.report.paired import paired
from sft_dist.report.scores import MAX_NAME, score_lines, sets_of
from sft_dist.report.text import NONE, clip, clock, duration, mapping, number, plain
from sft_dist.rundir import RunDir

# As many as can be told apart by colour.
MOST = 8
# What says where a run lies and not what it does.
PLACES = ("run.name", "run.dir")


def write_comparison(runs: Sequence[RunDir], path: Path) -> Path:
    """Write the page that compares these runs to `path`, and return it. Raises ConfigError for one run, or too many."""
    if not 2 <= len(runs) <= MOST:
        raise ConfigError(
            f"{len(runs)} run(s) to compare, and a page has two to {MOST}",
            hint="sft-dist report A B; one run has its own report, sft-dist report --index lists all",
        )
    places = [run.path.resolve() for run in runs]
    if again := next((run.name for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise ConfigError(f"{again} is named twice, and a run beside itself shows nothing", hint="name two runs")
    facts = [read_facts(run) for run in runs]
    names = _names(facts)
    notices, paired_tables = paired(names, facts)
    view = {
        "title": " and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        "runs": [(name, f"run{place}", one.status.get("state", "unknown")) for place, (name, one) in enumerate(zip(names, facts, strict=True), 1)],
        "outcome": _outcome(names, facts),
        "scores": _scores(names, facts),
        "notices": notices,
        "paired": paired_tables,
        "settings": _settings(names, facts),
        "curves": list(_curves(names, facts)),
    }  # fmt: skip
    write_text(path, render_page("compare.html.j2", view))
    return path


def write_index(runs: Sequence[RunDir], path: Path, root: Path | None = None) -> Path:
    """Write the page that lists these runs, which lie in `root`, the latest first, to `path`, and return it."""
    folder = path.parent.resolve()
    facts = sorted(((read_facts(run), run) for run in runs), key=lambda one: _last_heard(one[0]), reverse=True)
    view = {"root": str((root or folder).resolve()), "rows": [_listed(one, run, folder) for one, run in facts]}
    write_text(path, render_page("index.html.j2", view))
    return path


def _names(facts: Sequence[RunFacts]) -> list[str]:
    """Of runs in several folders that have the same name, numbered."""
    plain_names = [one.name for one in facts]
    return [name if plain_names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(plain_names, 1)]


def _outcome(names: Sequence[str], facts: Sequence[RunFacts]) -> Table:
    """A row for each figure that any run has."""
    columns = [dict(_figures(one)) for one in facts]
    titles = dict.fromkeys(title for column in columns for title in column)
    rows = [[title, *(column.get(title, NONE) for column in columns)] for title in titles]
    return "", ["", *names], rows


def _figures(facts: RunFacts) -> Iterator[tuple[str, str]]:
    yield "State", plain(facts.status.get("state", "unknown"))
    resolved = mapping(facts.env.get("resolved"))
    plan = resolved.get("plan") or config_value(facts.config_text, "parallel", "plan")
    for title, value in (("Model", config_value(facts.config_text, "model", "name")), ("Plan", plan)):
        if value:
            yield title, clip(plain(value), 200)
    if facts.step is not None:
        yield "Steps", plain(facts.step)
    for title, key in (("Training loss, last", "loss"), ("Evaluation loss, last", "eval_loss")):
        known = [value for _, value in series(facts.metrics, key) if value is not None]
        if known:
            yield title, f"{known[-1]:.4g}"
            if key == "eval_loss":
                yield "Evaluation loss, lowest", f"{min(known):.4g}"
    for title, key, best in (("Tokens", "tokens", max), ("Median tokens/s", "tokens_per_s", statistics.median)):
        values = [value for row in facts.metrics if (value := number(row.get(key))) is not None]
        if values:
            yield title, plain(int(best(values)))
    if (seconds := wall_seconds(facts)) is not None:
        yield "Wall time", duration(seconds)
    yield "Attempts", plain(len(facts.attempts))


def _scores(names: Sequence[str], facts: Sequence[RunFacts]) -> list[Table]:
    """A table for each score of each set: over all rows, then in each category, of each run how many rows, before and after."""
    columns = [dict(_score_cells(one)) for one in facts]
    titles = list(dict.fromkeys((place, score) for column in columns for place, score, _ in column))
    several = len({place for place, _ in titles}) > 1
    tables: list[Table] = []
    for place, score in titles:
        parts = list(dict.fromkeys(key[2] for column in columns for key in column if key[:2] == (place, score)))
        rows = [
            [part, name, *column.get((place, score, part), (NONE,) * 4)]
            for part in parts
            for name, column in zip(names, columns, strict=True)
        ]
        head = ["", "Run", "n", "before", "after", "change"]
        tables.append((f"{place}: {score}" if several else score, head, rows))
    return tables


def _score_cells(facts: RunFacts) -> Iterator[tuple[tuple[str, str, str], tuple[str, ...]]]:
    """Set, score and category; of how many rows, and what it was before and after, with intervals."""
    for name, part in sets_of(facts.scores):
        for line in score_lines(part, of_category=2):
            cells = (f"{cell.text} {cell.interval}".rstrip() for cell in (line.before, line.after, line.change))
            yield (clip(name, MAX_NAME), line.title, line.category or "All rows"), (plain(line.n), *cells)


def _settings(names: Sequence[str], facts: Sequence[RunFacts]) -> Table | None:
    """The fields of the configs that are not the same in all of them."""
    values = [flat_values(one.config_text) for one in facts]
    fields = sorted({field for one in values for field in one} - set(PLACES))
    differ = [field for field in fields if len({one.get(field, NONE) for one in values}) > 1]
    if not differ:
        return None
    rows = [[field, *(clip(one.get(field, NONE), MAX_CHARACTERS) for one in values)] for field in differ]
    return "", ["", *names], rows


def _curves(names: Sequence[str], facts: Sequence[RunFacts]) -> Iterator[tuple[str, Curve]]:
    for title, key in (
        ("Training loss", "loss"),
        ("Evaluation loss", "eval_loss"),
        ("Tokens per second", "tokens_per_s"),
    ):
        many = [
            (name, f"run{place}", series(one.metrics, key))
            for place, (name, one) in enumerate(zip(names, facts, strict=True), 1)
        ]
        if (curve := draw_together(many)) is not None:
            yield title, curve


def _listed(facts: RunFacts, run: RunDir, folder: Path) -> dict[str, Any]:
    """One run as a row of the index in `folder`; `href` is its report as seen from there, None if it has none."""
    first = next((line for _, part in sets_of(facts.scores) for line in score_lines(part)), None)
    losses = [value for _, value in series(facts.metrics, "loss") if value is not None]
    step, most = facts.step, number(facts.status.get("max_steps"))
    return {
        "name": facts.name,
        "href": quote(os.path.relpath(run.report.resolve(), folder)) if _is_there(run.report) else None,
        "state": facts.status.get("state", "unknown"),
        "model": clip(config_value(facts.config_text, "model", "name") or NONE, 200),
        "steps": NONE if step is None else plain(step) + (f" of {plain(int(most))}" if most is not None else ""),
        "loss": f"{losses[-1]:.4g}" if losses else NONE,
        "score": f"{first.title}: {first.before.text} to {first.after.text}" if first else NONE,
        "heard": clock(facts.status["updated"]) if "updated" in facts.status else NONE,
    }


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the folder of another user: it is listed as what it is, one whose files cannot be read
        return False


def _last_heard(facts: RunFacts) -> float:
    heard = moment(facts.status.get("updated"))
    return heard.timestamp() if heard else 0.0
