"""Everything a report says about a run, read from its directory; a missing or damaged file is an empty one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.errors import SftDistError
from sft_dist.files import moment
from sft_dist.jobs.records import Submitted, submitted_jobs
from sft_dist.report.text import mapping, number
from sft_dist.rundir import RunDir


@dataclass(frozen=True)
class RunFacts:
    """The content of a run directory; `problems` names the files that could not be read in full."""

    name: str
    status: dict[str, Any]
    env: dict[str, Any]
    scores: dict[str, Any]
    ledger: dict[str, Any]
    provenance: dict[str, Any]
    attempts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    config_text: str
    jobs: tuple[Submitted, ...]
    """Oldest first."""
    problems: tuple[str, ...]

    @property
    def step(self) -> int | None:
        """The last step: status.json is some seconds late where the process was killed."""
        said = [number(self.status.get("step")), *(number(row.get("step")) for row in self.metrics[-1:])]
        return max((int(it) for it in said if it is not None), default=None)


def read_facts(run: RunDir) -> RunFacts:
    """Read a run in whatever state it is. Raises SftDistError if there is no such directory."""
    if not run.path.is_dir():
        raise SftDistError(f"there is no run directory {run.path}", hint="give the path of a folder that holds a run")
    problems: list[str] = []

    def one(path: Path) -> dict[str, Any]:
        return _read_object(path, run.path, problems)

    def many(path: Path) -> list[dict[str, Any]]:
        return _read_rows(path, run.path, problems)

    return RunFacts(
        name=run.path.resolve().name,
        status=one(run.status),
        env=one(run.env),
        scores=one(run.scores),
        ledger=one(run.ledger),
        provenance=one(run.provenance),
        attempts=many(run.attempts),
        metrics=many(run.metrics),
        before=many(run.eval / "before.jsonl"),
        after=many(run.eval / "after.jsonl"),
        config_text=_read(run.config, run.path, problems),
        jobs=submitted_jobs(_parse(_read(run.path / "slurm" / "job.json", run.path, problems))),
        problems=tuple(problems),
    )


def wall_seconds(facts: RunFacts) -> float | None:
    """Seconds spent in all attempts together; an attempt without an end lasts until the last sign of life.

    Without attempts, from the first log event to the last; None if nothing says.
    """
    seen = [row.get("time") for row in (*facts.metrics[:1], *facts.metrics[-1:])] + [facts.status.get("updated")]
    times = [time for time in map(moment, seen) if time is not None]
    spans = []
    for attempt in facts.attempts:
        start = moment(attempt.get("start"))
        end = moment(attempt.get("end")) or (max(times) if times and attempt is facts.attempts[-1] else None)
        if start is not None and end is not None:
            spans.append(max(0.0, (end - start).total_seconds()))
    if spans:
        return sum(spans)
    logged = [time for time in (moment(row.get("time")) for row in facts.metrics) if time is not None]
    return (max(logged) - min(logged)).total_seconds() if len(logged) > 1 else None


def _read(path: Path, root: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.relative_to(root)} could not be read ({error.strerror})")
        return ""


def _read_object(path: Path, root: Path, problems: list[str]) -> dict[str, Any]:
    text = _read(path, root, problems)
    if not text:
        return {}
    value = _parse(text)
    if not isinstance(value, dict):
        problems.append(f"{path.relative_to(root)} holds no JSON object")
    return mapping(value)


def _read_rows(path: Path, root: Path, problems: list[str]) -> list[dict[str, Any]]:
    # Split at newlines only: str.splitlines would also cut at U+2028 inside an answer. A torn line may stand in the
    # middle here (a killed writer, then a resumed one), which must cost that line and not the report.
    lines = [line for line in _read(path, root, problems).split("\n") if line.strip()]
    values: Sequence[Any] = [_parse(line) for line in lines]
    rows = [value for value in values if isinstance(value, dict)]
    if len(rows) < len(lines):
        problems.append(
            f"{path.relative_to(root)}: {len(lines) - len(rows):,} of {len(lines):,} lines left out (no JSON object)"
        )
    return rows


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
