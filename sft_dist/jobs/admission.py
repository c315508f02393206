"""What must hold before a job is handed over: the run is free, and what it is to wait for can still come."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
from collections.abc import Iterator, Sequence

from sft_dist.errors import ConfigError
from sft_dist.jobs.queue import ask_accounting, ask_queue, call, is_job_id
from sft_dist.jobs.status import look
from sft_dist.rundir import RunDir, find_run, refuse_existing

log = logging.getLogger(__name__)
# Of the states that a job does not leave, the only one that `afterok` waits for.
WELL = "COMPLETED"


def refuse_taken(run: RunDir, *, overwrite: bool) -> None:
    """ConfigError if the place of a new run is taken; with `overwrite` only by one that is at work or in a queue."""
    if overwrite:
        refuse_live(run)
    else:
        refuse_existing(run.path.parent, run.name)


def refuse_live(run: RunDir) -> None:
    """ConfigError if a process works on the run, or a job of it waits or runs, or if that cannot be told."""
    if not run.config.is_file():
        return
    seen = look([run])[0][0]
    if seen.verdict.live or run.held():
        job = seen.verdict.job
        holder = run.lock.read_text(encoding="utf-8").strip() if run.lock.is_file() else ""
        what = f"another process works on it ({holder or 'unknown'})"
        if job and job.phase != "ended":
            what = f"job {job.id} is {job.state}"
        raise ConfigError(f"run {run.name} is not stopped: {what}", hint=f"stop it first: sft-dist cancel {run.quoted}")
    if seen.unanswered or (seen.jobs and not seen.queue.known and seen.state in ("queued", "running")):
        why = "; ".join(seen.queue.notes) or "no squeue knows it here"
        raise ConfigError(
            f"whether job {seen.job_id} of run {run.name} is still in the queue cannot be told here ({why})",
            hint="try again, on a login node of the cluster that the run was submitted to",
        )


@contextlib.contextmanager
def submitting(run: RunDir) -> Iterator[None]:
    """Hold the run for one submission; ConfigError if there is another: each would queue a job of its own."""
    path = run.path / "slurm" / ".submitting"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run {run.name} is being submitted by another process",
                hint=f"see it with: sft-dist status {run.quoted}",
            ) from None
        except OSError:  # a filesystem without locks
            pass
        yield


def job_numbers(names: Sequence[str]) -> list[str]:
    """The jobs to wait for, of what `--after` names: numbers of jobs, or runs, whose last job is meant.

    What is done already is left out. Raises ConfigError for what will never be done: SLURM would start the new job at once
    if it has forgotten that one, and cancel it otherwise.
    """
    found = [_job(name) if is_job_id(name) else _job_of(find_run(name), name) for name in names]
    return [number for number in found if number is not None]


def _job_of(run: RunDir, name: str) -> str | None:
    seen = look([run])[0][0]
    if seen.state == "done":
        log.info("--after %s: that run is done", name)
        return None
    if seen.in_queue:
        return seen.in_queue[-1].id
    if seen.jobs and not seen.queue.known:
        why = "; ".join(seen.queue.notes) or "no squeue knows it here"
        raise ConfigError(f"--after {name}: its job {seen.job_id} cannot be seen from here ({why})")
    raise ConfigError(
        f"--after {name}: that run is {seen.state} and has no job in the queue", hint=f"first: {seen.next_command}"
    )


def _job(number: str) -> str | None:
    said = call(["scontrol", "--oneliner", "show", "job", number])
    states = set(re.findall(r"\bJobState=(\w+)", said.text))
    if said.error and "invalid job id" not in said.error.lower():
        return number  # sbatch will say
    if not states:
        past = ask_accounting(ask_queue([]), [number]).jobs.get(number)
        states = {past.state} if past is not None else set()
    if states == {WELL}:
        log.info("--after %s: that job is done", number)
        return None
    lost = states & {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
    if lost or not states:
        what = f"is {', '.join(sorted(lost))}" if lost else "is not known to SLURM (any more)"
        raise ConfigError(f"--after {number}: that job {what}", hint="leave --after out, or submit that job again")
    return number
