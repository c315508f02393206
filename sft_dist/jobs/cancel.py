"""Stop a run so that it can go on later: mark it, ask its processes to save and end, and only then take its job away."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sft_dist.errors import SftDistError
from sft_dist.files import utc_now, write_text
from sft_dist.jobs.launcher import children
from sft_dist.jobs.queue import Job, call
from sft_dist.jobs.records import Record
from sft_dist.jobs.status import RunStatus, look
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
# The queue is asked this often while a job saves: the controller has other users.
POLL_S = 3.0
LOCAL_POLL_S = 0.2
# In scancel's messages about a job that has ended, or that has no step yet that could hear a signal.
ENDED_WORDS = ("invalid job", "already complet", "already finish", "not running", "pending")


def cancel(run: RunDir, *, wait_s: float = 120.0, now: bool = False) -> RunStatus:
    """Stop `run` and return what became of it; a run that has ended is left as it is.

    Jobs that wait leave the queue at once. A job that runs, or a process on this host, is asked to save and end, and the
    job is taken away if it is still there after `wait_s`; with `now` it is not asked. Raises SftDistError if the run is
    where it cannot be reached from, or the queue refuses.
    """
    before = _look(run)
    if before.jobs and not before.queue.known and before.state != "done" and not before.record.held:
        raise _out_of_reach(before)  # even a run that has stopped may be waiting in the queue to go on
    if before.state == "lost" or (before.state == "queued" and not before.verdict.live and not before.jobs):
        _mark(run)
        run.write_status(state="stopped", reason=before.record.status.get("reason") or "cancelled")
        return _look(run)
    if not before.verdict.live:
        if before.state in ("running", "queued"):
            raise _out_of_reach(before)
        return before
    fresh = not run.cancelled.exists()
    _mark(run)
    try:
        if before.in_queue:
            _cancel_jobs(run, before, wait_s, now)
        else:
            _stop_here(run, before.record, wait_s, now)
    except SftDistError:
        if fresh:  # it goes on as before, and may be requeued as before
            run.cancelled.unlink(missing_ok=True)
        raise
    return _settled(run)


def _look(run: RunDir) -> RunStatus:
    return look([run])[0][0]


def _mark(run: RunDir) -> None:
    """From here on nothing requeues the run; `resume` and `submit` take the mark away."""
    write_text(run.cancelled, f"cancelled {utc_now()}\n")


def _cancel_jobs(run: RunDir, before: RunStatus, wait_s: float, now: bool) -> None:
    """Those that wait first, so that none of them starts when the one before it ends."""
    waiting = [job for job in before.in_queue if job.phase == "waiting"]
    active = [job for job in before.in_queue if job.phase == "active"]
    _scancel(waiting)
    if not active:
        return
    if not now:
        # Without --batch and --full the batch script hears nothing and lives until its step has saved and ended. Not
        # SIGTERM: some clusters send it to every process of the step, and torchrun's agent would end its workers.
        _scancel(active, "--signal=USR1")
        log.info("asked job %s to save and end; waiting up to %.0f s", active[0].id, wait_s)
        if _within(wait_s, POLL_S, lambda: not _still_there(run)):
            return
        log.warning("job %s is still there after %.0f s and is taken away", active[0].id, wait_s)
    # Also what has come back into the queue meanwhile: a requeue that was under way.
    _scancel(_look(run).in_queue)
    _within(min(wait_s, 60.0) or 5.0, POLL_S, lambda: not _still_there(run))


def _still_there(run: RunDir) -> bool:
    """Whether a job of the run has its nodes; one that was requeued meanwhile leaves the queue."""
    seen = _look(run)
    _scancel([job for job in seen.in_queue if job.phase == "waiting"])
    return any(job.phase == "active" for job in seen.in_queue)


def _scancel(jobs: Sequence[Job], *options: str) -> None:
    """SftDistError if SLURM refuses; a job that has ended meanwhile is none."""
    if not jobs:
        return
    said = call(["scancel", *options, *(job.id for job in jobs)])
    if said.error and (said.missing or not any(word in said.error.lower() for word in ENDED_WORDS)):
        hint = "type it on a login node of the cluster" if said.missing else None
        raise SftDistError(f"the job could not be cancelled: {said.error}", hint=hint)


def _stop_here(run: RunDir, record: Record, wait_s: float, now: bool) -> None:
    """Ask the process that holds the run to save and end, or end it."""
    pid = holder(record)
    if pid is None:
        where = f"process {record.lock.pid} on {record.lock.host}" if record.lock else "a process elsewhere"
        raise SftDistError(
            f"run {run.name} is being worked on by {where}, which cannot be reached from here",
            hint="type the same command there",
        )
    started = children(pid) if now else []
    for process in (pid, *started):  # workers would save when the one that started them is gone
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(process, signal.SIGKILL if now else signal.SIGTERM)
    if not now:
        log.info("asked process %d to save and end; waiting up to %.0f s", pid, wait_s)
    if not _within(wait_s, LOCAL_POLL_S, lambda: not run.held()):
        raise SftDistError(
            f"process {pid} has been asked to stop and is still there after {wait_s:.0f} s",
            hint=f"it ends when it has saved; without a save: sft-dist cancel {run.quoted} --now",
        )


def holder(record: Record) -> int | None:
    """The process on this host that has the run's lock file open; None if it is not here, or not ours to see.

    Its number alone would not do: it may have gone to another process, on this host or in another namespace.
    """
    if record.lock is None or not record.held:
        return None
    with contextlib.suppress(OSError):
        lock = record.run.lock.stat()
        for link in Path(f"/proc/{record.lock.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                opened = link.stat()
                if (opened.st_dev, opened.st_ino) == (lock.st_dev, lock.st_ino):
                    return record.lock.pid
    return None


def _within(seconds: float, every: float, reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(every, max(0.05, deadline - time.monotonic())))
    return True


def _settled(run: RunDir) -> RunStatus:
    """Put on record that the run has stopped, where no process of it was left to do so."""
    after = _look(run)
    if not after.verdict.live and after.record.status.get("state") in ("running", "queued"):
        saved = after.record.status.get("checkpoint")
        run.write_status(state="stopped", reason=f"cancelled; kept: {saved}" if saved else "cancelled")
        return _look(run)
    return after


def _out_of_reach(status: RunStatus) -> SftDistError:
    what = f"job {status.job_id}" if status.jobs else "its process"
    why = "; ".join(status.queue.notes) or status.verdict.why or "no squeue knows it here"
    return SftDistError(
        f"run {status.name} is {status.state}, but {what} cannot be reached from here ({why})",
        hint="type the same command on the host, or on a login node of the cluster, where it was started",
    )
