"""The state of runs for the terminal: a table of all, and the details of one."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.files import moment
from sft_dist.jobs.walltime import sentences
from sft_dist.report.text import NONE, clip, clock, duration, plain, visible

if TYPE_CHECKING:
    from rich.table import Table

    from sft_dist.jobs.status import RunStatus

STYLES = {"running": "green", "queued": "cyan", "lost": "bold red", "failed": "red", "stopped": "yellow", "done": ""}
MAX_NAME, MAX_WHY = 60, 80
SHOWN_ATTEMPTS = 5
# The least width of columns that fold, and what a narrow terminal goes without, the first first.
FOLDED = {"run": 8, "why": 10}
SPARE = ("nodes", "tries", "GPU h", "heard", "loss", "job")
BETWEEN = 2


def status_table(statuses: Sequence[RunStatus], width: int) -> Table:
    """One line a run, in as many columns as `width` has room for."""
    from rich.table import Table

    rows = [_cells(status) for status in statuses]
    room = {name: FOLDED.get(name) or max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    # Rich takes room from columns that fold beyond their least width, down to none, before it cuts the others.
    for name in SPARE:
        if sum(room.values()) + BETWEEN * len(room) > width:
            del room[name]
    table = Table(box=None, pad_edge=False, padding=(0, BETWEEN, 0, 0))
    for name in room:
        if name in FOLDED:
            table.add_column(name, overflow="fold", min_width=FOLDED[name])
        else:
            table.add_column(name, justify="left" if name in ("state", "job") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in room))
    return table


def _cells(status: RunStatus) -> dict[str, Any]:
    """What stands in a run's line, by the name of the column."""
    from rich.text import Text

    now = datetime.datetime.now(datetime.UTC)
    return {
        "run": _text(status.name, MAX_NAME),
        "state": Text(status.state, style=STYLES.get(status.state, "")),
        "step": _steps(status),
        "loss": NONE if status.loss is None else f"{status.loss:.4g}",
        "left": _short(status.eta_s),
        "job": _text(status.job_id or NONE, 30),
        "nodes": plain(status.nodes),
        "tries": plain(status.attempts or None),
        "GPU h": _hours(status.gpu_hours),
        "heard": _ago(status, now),
        "why": _text(_why(status, now), MAX_WHY),
    }


def details(status: RunStatus) -> Iterator[str]:
    """What there is to say about one run beside its line in the table."""
    record = status.record
    yield f"directory   {_shown(str(record.run.path), 400)}"
    if status.verdict.why:
        yield f"why         {_shown(status.verdict.why, 400)}"
    if status.verdict.starts is not None:
        yield f"starts      {clock(status.verdict.starts.isoformat())} (the scheduler's estimate)"
    yield f"checkpoint  {_shown(plain(record.status.get('checkpoint')), 100)}"
    walltime = status.walltime()
    if walltime is not None:
        for word, lines in zip(("walltime   ", "warning    "), sentences(walltime, str(record.run.path)), strict=True):
            yield from (f"{word} {_shown(line, 300)}" for line in lines)
    for attempt in record.attempts[-SHOWN_ATTEMPTS:]:
        yield f"attempt     {_attempt(attempt)}"
    failure = record.attempts[-1].get("failure") if record.attempts else None
    if isinstance(failure, dict) and status.state not in ("running", "done"):
        yield f"failure     {_shown(_failure(failure), 400)}"
    for problem in record.problems:
        yield f"problem     {_shown(problem, 200)}"
    yield f"next        {_shown(status.next_command, 400)}"


def _attempt(row: Any) -> str:
    """One line of attempts.jsonl."""
    start, end = moment(row.get("start")), moment(row.get("end"))
    took = duration((end - start).total_seconds()) if start and end else NONE
    where = f"job {plain(row['job_id'])}" if row.get("job_id") is not None else plain(row.get("host"))
    steps = f"steps {plain(row.get('first_step'))} to {plain(row.get('last_step'))}"
    parts = [plain(row.get("attempt")), clock(row.get("start")), took, where, steps, plain(row.get("ended"))]
    parts += [plain(row[name]) for name in ("reason", "decided") if row.get(name)]
    return _shown("  ".join(parts), 300)


def _failure(failure: dict[str, Any]) -> str:
    """Class, place and evidence of the last failure; its sentence is what `why` says."""
    named = (("rank", "rank {}"), ("node", "node {}"), ("evidence", "said: {}"))
    parts = [form.format(plain(failure[name])) for name, form in named if failure.get(name) not in (None, "")]
    return "  ".join([plain(failure.get("kind")), *parts])


def _why(status: RunStatus, now: datetime.datetime) -> str:
    starts = status.verdict.starts
    estimate = f"; starts in about {duration((starts - now).total_seconds())}" if starts and starts > now else ""
    return f"{status.verdict.why}{estimate}"


def _steps(status: RunStatus) -> str:
    if status.step is None:
        return NONE
    return f"{status.step}/{status.max_steps}" if status.max_steps else str(status.step)


def _hours(hours: float | None) -> str:
    return NONE if not hours else f"{hours:.2f}" if hours < 100 else f"{hours:,.0f}"


def _ago(status: RunStatus, now: datetime.datetime) -> str:
    heard = status.record.heard
    return NONE if heard is None else _short((now - heard).total_seconds())


def _short(seconds: float | None) -> str:
    """A span of time in its two largest units, without spaces."""
    return duration(seconds).replace("min", "m").replace(" ", "") if seconds is not None else NONE


def _text(value: str, limit: int) -> Any:
    """Text in which neither rich's markup nor the terminal's escape codes have an effect."""
    from rich.text import Text

    return Text(_shown(value, limit))


def _shown(value: str, limit: int) -> str:
    return visible(clip(value, limit)).replace("\n", " ")
