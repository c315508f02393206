"""The state of runs, from their folders and one look at the queue: what `status` shows, and `logs` and `cancel` go by."""

from __future__ import annotations

import datetime
import itertools
import math
import socket
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sft_dist.files import moment
from sft_dist.jobs.queue import Job, Queue, ask_accounting, ask_queue, local_cluster
from sft_dist.jobs.records import Record, Row, Submitted, gpus_of_attempt, read_record, whole
from sft_dist.jobs.verdict import Verdict, jobs_of, seen_from, unresolved, verdict
from sft_dist.jobs.walltime import Outlook, run_outlook
from sft_dist.rundir import RunDir

# In the order of the table: first what needs a look.
ORDER = ("running", "queued", "lost", "stopped", "failed", "done", "unknown")
# Each file of a run costs a round trip on a shared filesystem.
READERS = 8
# The time left follows from this many log events at least, and from those of this many seconds: times are whole seconds.
RECENT, RECENT_S = 20, 60.0


@dataclass(frozen=True)
class RunStatus:
    """A run as `status` shows it."""

    record: Record
    verdict: Verdict
    jobs: tuple[Submitted, ...]
    queue: Queue
    loss: float | None
    eta_s: float | None
    gpu_hours: float | None

    @property
    def name(self) -> str:
        return self.record.run.name

    @property
    def state(self) -> str:
        return self.verdict.state

    @property
    def in_queue(self) -> tuple[Job, ...]:
        """The jobs of the run that wait or run."""
        known = [self.queue.jobs[it.id] for it in self.jobs if it.id in self.queue.jobs]
        return tuple(job for job in known if job.phase != "ended")

    @property
    def unanswered(self) -> bool:
        """There is a queue that may know more, but it gave no answer."""
        return bool(self.jobs) and self.queue.silent

    @property
    def step(self) -> int | None:
        return self.record.step

    @property
    def max_steps(self) -> int | None:
        return whole(self.record.status.get("max_steps"))

    @property
    def attempts(self) -> int:
        return max(whole(self.record.status.get("attempt")) or 0, len(self.record.attempts))

    @property
    def job_id(self) -> str | None:
        newest = self.jobs[-1].id if self.jobs else None
        return self.verdict.job.id if self.verdict.job is not None else newest

    @property
    def nodes(self) -> int | None:
        """Of the job, else of the last attempt: one, if it was no job."""
        if self.verdict.job is not None and self.verdict.job.nodes:
            return self.verdict.job.nodes
        said = self.record.attempts[-1].get("nodes") if self.record.attempts else None
        if self.jobs and self.jobs[-1].nodes:
            return self.jobs[-1].nodes
        return len(said) if isinstance(said, list) else whole(said) or (1 if self.attempts else None)

    def walltime(self) -> Outlook | None:
        """What the time limit of its jobs leaves for a run that has some and goes on; reads its pace and config."""
        goes_on = bool(self.jobs) and self.state in ("running", "queued", "stopped", "lost")
        return run_outlook(self.record.run, self.step, self.max_steps) if goes_on else None

    @property
    def next_command(self) -> str:
        """What to type next."""
        if self.state == "running":
            return f"sft-dist logs -f {self.record.run.quoted}"
        if self.state == "queued" and (self.verdict.live or self.jobs):
            return f"sft-dist cancel {self.record.run.quoted}"
        if self.state == "done":
            return f"sft-dist report {self.record.run.quoted}"
        to_slurm = self.jobs or (self.record.run.plan / "job.sbatch").is_file()  # sbatch may have refused it
        return f"sft-dist {'submit' if to_slurm else 'resume'} {self.record.run.quoted}"

    def facts(self) -> dict[str, Any]:
        """The values as JSON."""
        status, heard, starts = self.record.status, self.record.heard, self.verdict.starts
        walltime = self.walltime()
        return {
            "name": self.name,
            "directory": str(self.record.run.path),
            "state": self.state,
            "why": self.verdict.why,
            "live": self.verdict.live,
            "step": self.step,
            "max_steps": self.max_steps,
            "loss": self.loss,
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "job_id": self.job_id,
            "job_state": None if self.verdict.job is None else self.verdict.job.state,
            "starts": None if starts is None else starts.isoformat(),
            "nodes": self.nodes,
            "attempts": self.attempts,
            "gpu_hours": None if self.gpu_hours is None else round(self.gpu_hours, 4),
            "last_heard": None if heard is None else heard.isoformat(),
            "checkpoint": status.get("checkpoint"),
            "cancelled": self.record.cancelled,
            "walltime": None if walltime is None else walltime.facts(),
            "last_attempts": list(self.record.attempts[-5:]),
            "problems": list(self.record.problems),
            "next": self.next_command,
        }


def look(runs: Sequence[RunDir]) -> tuple[list[RunStatus], tuple[str, ...]]:
    """The state of each run, running ones first and the newest first, and notes on what could not be found out."""
    with ThreadPoolExecutor(READERS) as readers:
        records = list(readers.map(read_record, runs))
    cluster, here = local_cluster(), socket.gethostname()
    jobs = [jobs_of(record) for record in records]
    pairs = list(zip(records, jobs, strict=True))
    seen = [(record, of) for record, of in pairs if seen_from(cluster, of) and record.status.get("state") != "done"]
    queue = ask_queue(it.id for _, of in seen for it in of)
    unclear = (unresolved(record, of, queue) for record, of in seen)
    queue = ask_accounting(queue, [job for job in unclear if job is not None])
    now = datetime.datetime.now(datetime.UTC)
    found = [_status(record, of, queue if seen_from(cluster, of) else Queue(), here, now) for record, of in pairs]
    return sorted(found, key=_place), queue.notes


def seconds_a_step(rows: Sequence[Row]) -> float | None:
    """Seconds a step from the times of the last log events; pauses between attempts do not count."""
    seen = [(time, step) for row in rows if (time := moment(row.get("time"))) and (step := whole(row.get("step")))]
    pairs: list[tuple[float, int]] = []
    for (early, before), (late, after) in reversed(list(itertools.pairwise(seen))):
        if len(pairs) >= RECENT and sum(seconds for seconds, _ in pairs) >= RECENT_S:
            break
        if after > before and late >= early:
            pairs.append(((late - early).total_seconds(), after - before))
    if not pairs:
        return None
    usual = statistics.median(seconds / steps for seconds, steps in pairs)
    # Times are whole seconds: a slow logging_steps=1 run differs by one, a pause by much more.
    usual_pairs = [(seconds, steps) for seconds, steps in pairs if seconds <= 5 * usual * steps + 30]
    # None as long as all of them were logged within one second: no time is left would be said at step 5 of 3,000.
    return sum(seconds for seconds, _ in usual_pairs) / sum(steps for _, steps in usual_pairs) or None


def gpu_hours(
    record: Record,
    jobs: Sequence[Submitted],
    until: datetime.datetime | None = None,
    began: datetime.datetime | None = None,
    job_id: str | None = None,
) -> float | None:
    """GPU hours of the attempts on record and, from `began` to `until`, of one that is not (of job `job_id`); None where nothing says."""
    spans: list[tuple[float, int | None]] = []
    ended: datetime.datetime | None = None
    for row in record.attempts:
        start, end = moment(row.get("start")), moment(row.get("end"))
        if start is None or end is None:
            continue
        spans.append(((end - start).total_seconds(), gpus_of_attempt(row, jobs, record.gpus)))
        ended = end if ended is None else max(ended, end)
    if began is not None and until is not None:
        start = began if ended is None else max(began, ended)
        spans.append(((until - start).total_seconds(), gpus_of_attempt({"job_id": job_id or ""}, jobs, record.gpus)))
    known = [max(0.0, seconds) * gpus / 3600 for seconds, gpus in spans if gpus is not None]
    return sum(known) if known else None


def _status(record: Record, jobs: tuple[Submitted, ...], queue: Queue, here: str, now: datetime.datetime) -> RunStatus:
    found = verdict(record, jobs, queue, here=here, now=now)
    step, total = record.step, whole(record.status.get("max_steps"))
    pace = seconds_a_step(record.rows) if found.state == "running" else None
    left = None if pace is None or step is None or total is None else max(0, total - step) * pace
    losses = [row["loss"] for row in record.rows if isinstance(row.get("loss"), (int, float))]
    finite = losses and abs(losses[-1]) < 1e300
    active = found.job if found.job is not None and found.job.phase == "active" else None
    began = active.start if active else record.lock.since if record.lock is not None else None
    until = {"running": now, "lost": record.heard}.get(found.state)
    job = found.job.id if found.job is not None else jobs[-1].id if jobs else None
    hours = gpu_hours(record, jobs, until, began, job)
    return RunStatus(record, found, jobs, queue, float(losses[-1]) if finite else None, left, hours)


def _place(status: RunStatus) -> tuple[int, float, str]:
    heard = status.record.heard
    return ORDER.index(status.state), -heard.timestamp() if heard else math.inf, status.name
