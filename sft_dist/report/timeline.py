"""The attempts of a run on one axis of time: what they spent in steps that count, in steps done again, and on the rest."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.files import moment
from sft_dist.jobs.records import Submitted, gpus_of_attempt
from sft_dist.report.facts import RunFacts
from sft_dist.report.text import clock, duration, mapping, number, plain

# Attempts that are drawn, the latest ones: more would be a page of their own.
DRAWN = 60
KINDS = ("queue", "rest", "work", "lost")
WORDS = {
    "queue": "waiting to be started",
    "rest": "starting, saving, evaluating, ending",
    "work": "steps that count",
    "lost": "steps that had to be done again",
}


@dataclass(frozen=True)
class Span:
    """One attempt; seconds by kind. They add up to its length, with what it waited before."""

    name: str
    start: datetime.datetime
    seconds: dict[str, float]
    ended: str
    gpus: int | None
    """On all nodes together; 0 on CPUs, None where nothing says."""


@dataclass(frozen=True)
class Bar:
    """One attempt as the template draws it: (kind, left, width) in percent of the axis, and a line of text."""

    name: str
    parts: tuple[tuple[str, str, str], ...]
    title: str


@dataclass(frozen=True)
class Timeline:
    """What the template draws; `totals` are (kind, words, time) over all attempts."""

    bars: tuple[Bar, ...]
    begins: str
    ends: str
    totals: tuple[tuple[str, str, str], ...]
    summary: str
    left_out: int


def timeline(facts: RunFacts) -> Timeline | None:
    """None if no attempt has a beginning and an end."""
    spans = attempt_spans(facts)
    if not spans:
        return None
    shown = spans[-DRAWN:]
    begins = shown[0].start - datetime.timedelta(seconds=shown[0].seconds["queue"])
    last = shown[-1]
    ends = last.start + datetime.timedelta(seconds=sum(last.seconds[kind] for kind in KINDS[1:]))
    whole = max(1e-9, (ends - begins).total_seconds())
    totals = {kind: sum(span.seconds[kind] for span in spans) for kind in KINDS}
    return Timeline(
        bars=tuple(_bar(span, begins, whole) for span in shown),
        begins=clock(begins.isoformat()),
        ends=clock(ends.isoformat()),
        totals=tuple((kind, WORDS[kind], duration(totals[kind])) for kind in KINDS if totals[kind] >= 0.5),
        summary=" ".join(filter(None, [_summary(totals, spans), _energy(facts)])),
        left_out=len(spans) - len(shown),
    )


def attempt_spans(facts: RunFacts) -> list[Span]:
    """Each attempt that has a start, oldest first; one without an end lasts until the last sign of life.

    Steps count by the rows that metrics.jsonl holds in the end: tokens over tokens_per_s of those that were logged during the
    attempt. Steps done again are those that it had reached beyond the checkpoint that the next one went on from.
    """
    rows, step_s = _timed_rows(facts.metrics)
    spans: list[Span] = []
    before = _submission(facts.jobs, facts.attempts)
    for place, line in enumerate(facts.attempts):
        later = facts.attempts[place + 1 :]
        start = moment(line.get("start"))
        end = moment(line.get("end")) or _last_sign(facts, start, later)
        if start is None or end is None or end < start:
            continue
        length = (end - start).total_seconds()
        work = min(length, sum(seconds for time, seconds in rows if start <= time <= end))
        lost = min(length - work, _steps_again(line) * step_s if later else 0.0)
        waited = max(0.0, (start - before).total_seconds()) if before else 0.0
        seconds = {"queue": waited, "rest": length - work - lost, "work": work, "lost": lost}
        gpus = gpus_of_attempt(line, facts.jobs, gpus_of(facts))
        spans.append(Span(plain(line.get("attempt")), start, seconds, plain(line.get("ended")), gpus))
        before = end
    return spans


def _submission(jobs: Sequence[Submitted], attempts: Sequence[dict[str, Any]]) -> datetime.datetime | None:
    """When the run was first put into a queue, if its first attempt came after that."""
    start = next((time for line in attempts if (time := moment(line.get("start"))) is not None), None)
    asked = [
        job.submitted for job in jobs if job.submitted is not None and start is not None and job.submitted <= start
    ]
    return min(asked, default=None)


def gpus_of(facts: RunFacts) -> int | None:
    """GPUs of the run as it was started last; 0 on CPUs, None where nothing says."""
    resolved = mapping(facts.env.get("resolved"))
    size = number(resolved.get("world_size"))
    return None if size is None else 0 if resolved.get("use_cpu") else int(size)


def _summary(totals: dict[str, float], spans: Sequence[Span]) -> str:
    """Which share of the time was spent on steps that count, and how many GPU hours that and the rest cost.

    Each attempt by its own number of GPUs: a run may have been requeued on fewer.
    """
    running = sum(totals[kind] for kind in KINDS[1:])
    if running <= 0:
        return ""
    text = f"{totals['work'] / running:.1%} of {duration(running)} in attempts were steps that count"
    counts = sorted({span.gpus for span in spans if span.gpus})
    if not counts:
        return f"{text}."
    hours = {kind: sum(span.seconds[kind] * (span.gpus or 0) for span in spans) / 3600 for kind in KINDS}
    known = sum(span.gpus is not None for span in spans)
    where = f"{counts[0]} GPU{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} GPUs"
    of = "" if known == len(spans) else f" in {known} of {len(spans)} attempts"
    return f"{text}: {plain(hours['work'])} GPU hours on {where}{of}, and {plain(hours['lost'] + hours['rest'])} around them."


def _energy(facts: RunFacts) -> str:
    """What the GPUs have used, of the attempts that say so."""
    known = [kwh for line in facts.attempts if (kwh := number(line.get("energy_kwh"))) is not None]
    if not known:
        return ""
    count = "" if len(known) == len(facts.attempts) else f" in {len(known)} of {len(facts.attempts)} attempts"
    return f"The GPUs used {sum(known):.4g} kWh while training{count}."


def _timed_rows(metrics: Sequence[dict[str, Any]]) -> tuple[list[tuple[datetime.datetime, float]], float]:
    """When each row of the training was logged with the seconds of its steps, and the median seconds of one step."""
    found: list[tuple[datetime.datetime, float]] = []
    each: list[float] = []
    tokens = step = 0.0
    for row in metrics:
        now, speed, at = number(row.get("tokens")), number(row.get("tokens_per_s")), number(row.get("step"))
        time = moment(row.get("time"))
        if now is None or not speed or at is None or time is None:
            continue
        seconds = max(0.0, now - tokens) / speed
        found.append((time, seconds))
        if at > step:
            each.append(seconds / (at - step))
        tokens, step = now, at
    return found, statistics.median(each) if each else 0.0


def _steps_again(line: dict[str, Any]) -> float:
    reached = mapping(line.get("reached"))
    step, kept = number(reached.get("step")), number(reached.get("checkpoint"))
    return max(0.0, (step or 0.0) - (kept or 0.0))


def _last_sign(
    facts: RunFacts, start: datetime.datetime | None, later: Sequence[dict[str, Any]]
) -> datetime.datetime | None:
    """Of an attempt whose end nobody wrote down: the last row before the next one began, or the status."""
    if start is None:
        return None
    until = moment(later[0].get("start")) if later else moment(facts.status.get("updated"))
    times = [time for row in facts.metrics if (time := moment(row.get("time"))) is not None]
    inside = [time for time in times if time >= start and (until is None or time <= until)]
    return until if not later else max(inside, default=start)


def _bar(span: Span, begins: datetime.datetime, whole: float) -> Bar:
    left = (span.start - begins).total_seconds() - span.seconds["queue"]
    parts = []
    for kind in KINDS:
        width = span.seconds[kind]
        if width > 0:
            parts.append((kind, f"{100 * left / whole:.3f}%", f"{100 * width / whole:.3f}%"))
        left += width
    told = ", ".join(f"{duration(span.seconds[kind])} {WORDS[kind]}" for kind in KINDS if span.seconds[kind] >= 0.5)
    return Bar(span.name, tuple(parts), f"attempt {span.name}, {span.ended}: {told or '0 s'}")
