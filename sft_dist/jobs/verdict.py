"""What state a run is really in: what its status.json says, held against the lock, the queue and the accounting."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.jobs.failures import sentence_of_state
from sft_dist.jobs.queue import Job, Queue
from sft_dist.jobs.records import Record, Submitted
from sft_dist.rundir import STATES

# A worker writes status.json every few seconds. A job that is not in the queue may be in another cluster's: as long as
# the run was heard of within this time, it is not called lost.
QUIET = datetime.timedelta(seconds=60)
# A run has one job, or a few in a chain; those before have ended.
MAX_JOBS = 20


@dataclass(frozen=True)
class Verdict:
    """The state of a run now."""

    state: str
    """One of rundir.STATES, `lost` (said to be running or queued, but nothing is there), or `unknown`."""
    why: str = ""
    job: Job | None = None
    live: bool = False
    """A process or a job of this run is there, even if the run itself has stopped or failed."""
    starts: datetime.datetime | None = None
    """When the scheduler expects it to start."""


def jobs_of(record: Record) -> tuple[Submitted, ...]:
    """The run's jobs on SLURM, oldest first; what submitit runs on a host of its own is a process like any other.

    A copy of a run's folder names that run's jobs, which are not the copy's: `cancel` would end them.
    """
    known = tuple(job for job in record.jobs if job.cluster != "local" and not job.of_another(record.run))
    if record.jobs:
        return known[-MAX_JOBS:]
    # Submitted by hand: only the attempts say so.
    found = dict.fromkeys(str(row["job_id"]) for row in record.attempts if row.get("job_id") is not None)
    return tuple(Submitted(number) for number in found)[-MAX_JOBS:]


def seen_from(cluster: str | None, jobs: Sequence[Submitted]) -> bool:
    """Whether the queue of this cluster knows these jobs; two clusters may use the same numbers."""
    named = jobs[-1].cluster if jobs else None
    return named is None or cluster is None or named.lower() == cluster.lower()


def job_now(jobs: Sequence[Submitted], queue: Queue) -> Job | None:
    """Of the run's jobs the one that counts: one that is active, else the first that waits, else the newest known."""
    known = [queue.jobs[it.id] for it in jobs if it.id in queue.jobs]
    for phase in ("active", "waiting"):
        if found := [job for job in known if job.phase == phase]:
            return found[0]
    return known[-1] if known and known[-1].id == jobs[-1].id else None


def unresolved(record: Record, jobs: Sequence[Submitted], queue: Queue) -> str | None:
    """The job that accounting must be asked about: the run says that it is alive, and squeue does not know the job."""
    said = record.status.get("state") in ("running", "queued")
    return jobs[-1].id if said and jobs and not record.held and job_now(jobs, queue) is None else None


def verdict(record: Record, jobs: Sequence[Submitted], queue: Queue, *, here: str, now: datetime.datetime) -> Verdict:
    """The state of the run, seen from the host `here`."""
    said, reason = record.status.get("state"), str(record.status.get("reason") or "")
    said = said if said in STATES else "unknown"
    if said == "unknown":
        reason = "; ".join(record.problems) or "status.json names no state"
    job = job_now(jobs, queue)
    if said == "done":
        return Verdict("done", reason, job)
    if record.held:
        return Verdict("running", "stopping" if record.cancelled else "", job, live=True)
    if job is not None and job.phase == "waiting":
        return Verdict("queued", _waits_for(job), job, live=True, starts=job.start)
    if job is not None and job.phase == "active":
        return _with_active_job(record, job, said, reason)
    if said in ("running", "queued") and record.jobs and record.jobs[-1].of_another(record.run):
        return Verdict("lost", f"a copy: job {record.jobs[-1].id} works on {record.jobs[-1].run}")
    if said == "running":
        return _said_running(record, jobs, job, queue, here, now)
    if said == "queued" and jobs:
        if job is not None:
            if job.state == "CANCELLED":  # by hand; a run that was to be requeued is left as `queued`
                return Verdict("stopped", f"job {job.id} was cancelled", job)
            return Verdict("lost", _ended(job), job)
        if queue.known:
            return Verdict("lost", f"job {jobs[-1].id} is not in the queue any more")
        return Verdict("queued", "its queue cannot be seen from here")
    if said == "queued":
        return Verdict("queued", "nothing has started it yet")
    return Verdict(said, "cancelled" if record.cancelled and said == "stopped" and not reason else reason, job)


def _with_active_job(record: Record, job: Job, said: str, reason: str) -> Verdict:
    """The job has its nodes. It may be older than the last word of the run (it is ending), or newer (it is starting)."""
    if said == "running":
        word = "" if job.state == "RUNNING" else job.state.lower()
        return Verdict("running", "stopping" if record.cancelled else word, job, live=True)
    if job.state == "COMPLETING" or (job.start and record.heard and job.start < record.heard):
        return Verdict(said, reason, job, live=True)
    return Verdict("running", "starting", job, live=True)


def _said_running(
    record: Record, jobs: Sequence[Submitted], job: Job | None, queue: Queue, here: str, now: datetime.datetime
) -> Verdict:
    """Nobody holds the run, as far as can be seen from here, and no job of it is in the queue: gone, or elsewhere?"""
    heard = record.heard
    if record.lock is not None and record.lock.host == here:
        return Verdict("lost", _ended(job) or f"process {record.lock.pid} on this host ended without a word", job)
    if job is not None and not (job.end and heard and heard > job.end + QUIET):
        return Verdict("lost", _ended(job), job)
    if jobs and job is None and queue.known and (heard is None or now - heard > QUIET):
        return Verdict("lost", f"job {jobs[-1].id} is not in the queue any more")
    where = f"on {record.lock.host}, " if record.lock is not None else ""
    return Verdict("running", f"{where}which cannot be seen from here" if where else "where cannot be seen from here")


def _ended(job: Job | None) -> str:
    if job is None:
        return ""
    meaning = sentence_of_state(job.state)
    return f"job {job.id} ended: {job.state}{f' ({meaning})' if meaning else ''}"


def _waits_for(job: Job) -> str:
    return job.reason or job.state.capitalize()
