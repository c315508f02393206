"""What SLURM says about jobs: one squeue and at most one sacct, whatever the number of jobs."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sft_dist.files import moment

# A controller that is busy answers within seconds; one that is down lets squeue wait for minutes.
TIMEOUT_S = 10.0
# One argument of a command may have 128 KiB on Linux; above this, all jobs are asked for.
MAX_IDS = 100_000

Phase = Literal["waiting", "active", "ended"]
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT"}

# Only the last field is free text: those before it are numbers, words and times, and hold no "|".
SQUEUE = ("%i", "%T", "%S", "%e", "%D", "%r")
SACCT = ("JobID", "State", "Start", "End", "NNodes")


@dataclass(frozen=True)
class Job:
    """One job as SLURM sees it."""

    id: str
    state: str
    """SLURM's word: PENDING, RUNNING, TIMEOUT, ..."""
    start: datetime.datetime | None = None
    """When it started; of a waiting job, when the scheduler expects it to start."""
    end: datetime.datetime | None = None
    nodes: int | None = None
    reason: str = ""
    """Why it waits."""

    @property
    def phase(self) -> Phase:
        if self.state in WAITING:
            return "waiting"
        return "ended" if self.state in ENDED else "active"


@dataclass(frozen=True)
class Queue:
    """SLURM's answer for the jobs that were asked about."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    known: bool = False
    """squeue answered: a job that is not in `jobs` is not in the queue."""
    silent: bool = False
    """There is an squeue, but it gave no answer: what it would say may differ from what is known."""
    notes: tuple[str, ...] = ()


def is_job_id(text: str) -> bool:
    """Whether `text` is a job's number, or that of an array's task. Others are never passed to a command."""
    return re.fullmatch(r"\d{1,18}(_\d{1,9})?", text, re.ASCII) is not None


def ask_queue(ids: Iterable[str]) -> Queue:
    """What squeue says about these jobs; nothing is asked if there are none."""
    wanted = sorted({it for it in ids if is_job_id(it)})
    if not wanted:
        return Queue()
    listed = ",".join(wanted)
    # %i is what --jobs takes, with --array also for the waiting tasks of an array. A job that has ended stays listed for
    # MinJobAge (minutes): with accounting off nothing else says how it ended.
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={'|'.join(SQUEUE)}"]
    said = call([*command, *([f"--jobs={listed}"] if len(listed) < MAX_IDS else [])])
    if said.error and "Invalid job id" not in said.error:  # which is how it says that it knows none of them
        return Queue(silent=not said.missing, notes=(said.error,))
    # With SLURM_CLUSTERS squeue heads its answer, also an empty one, with "CLUSTER: NAME".
    lines = [line for line in said.text.splitlines() if line.strip() and not line.startswith("CLUSTER:")]
    rows = [row for line in lines if (row := _row(line)) is not None]
    if lines and not rows:  # a wrapper's message, half an answer: not an empty queue
        return Queue(silent=True, notes=(f"squeue: said what it does not say of jobs: {lines[0].strip()[:100]!r}",))
    return Queue({job.id: job for job in rows if job.id in wanted}, known=True)


def _row(line: str) -> Job | None:
    """The job that a line of squeue tells of; None for a line of another form."""
    fields = [part.strip() for part in line.split("|", len(SQUEUE) - 1)]
    # A waiting array as a whole is 12_[0-3%2].
    if len(fields) != len(SQUEUE) or re.match(r"\d", fields[0], re.ASCII) is None:
        return None
    job, state, start, end, nodes, reason = fields
    return Job(job, state, moment(start), moment(end), _count(nodes), _reason(reason))


def ask_accounting(queue: Queue, ids: Iterable[str]) -> Queue:
    """`queue` with what sacct says about jobs that are not in it; with accounting off it stays as it is, with a note."""
    wanted = sorted({it for it in ids if is_job_id(it)} - queue.jobs.keys())
    listed = ",".join(wanted)
    if not wanted or len(listed) >= MAX_IDS:
        return queue
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--format={','.join(SACCT)}"]
    said = call([*command, f"--jobs={listed}"])
    if said.error:
        notes = () if said.missing else (said.error,)
        return Queue(queue.jobs, queue.known, queue.silent, (*queue.notes, *notes))
    jobs = dict(queue.jobs)
    for line in said.text.splitlines():
        fields = line.split("|")
        if len(fields) == len(SACCT) and fields[0] in wanted:
            job, state, start, end, nodes = fields
            found = Job(job, (state.split() or [""])[0], moment(start), moment(end), _count(nodes))
            # A job that squeue does not know is over, whatever a record says that was never closed.
            if found.phase == "ended" or not queue.known:
                jobs[job] = found
    return Queue(jobs, queue.known, queue.silent, queue.notes)


def local_cluster() -> str | None:
    """The cluster that squeue asks here: $SLURM_CLUSTERS, else slurm.conf's ClusterName; None if there is none to read."""
    if chosen := os.environ.get("SLURM_CLUSTERS"):
        return chosen
    named = os.environ.get("SLURM_CONF")
    # The second is where a node without files of its own keeps what the controller sent it.
    for path in [named] if named else ["/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf"]:
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = re.search(r"^\s*ClusterName\s*=\s*([^\s#]+)", text, re.MULTILINE | re.IGNORECASE)
        return found[1] if found else None
    return None


@dataclass(frozen=True)
class Said:
    """What one of SLURM's commands said."""

    text: str = ""
    error: str | None = None
    """Why there is no answer, in one line."""
    missing: bool = False
    """This host has no such command."""


def call(command: Sequence[str]) -> Said:
    """Run one of SLURM's commands. It never raises and never asks; after TIMEOUT_S it is given up."""
    # Times come as local ones without a zone, and users' SQUEUE_FORMAT and the like change what is listed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    environment |= {"TZ": "UTC", "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        return Said(error=f"{command[0]}: there is no such command on this host", missing=True)
    except subprocess.TimeoutExpired:
        return Said(error=f"{command[0]}: no answer within {TIMEOUT_S:.0f} s")
    except OSError as error:
        return Said(error=f"{command[0]}: {error.strerror}", missing=True)
    if done.returncode == 0:
        return Said(done.stdout)
    lines = done.stderr.strip().splitlines() or [f"ended with exit status {done.returncode}"]
    said = lines[-1].strip()[:200]
    return Said(done.stdout, error=said if said.startswith(command[0]) else f"{command[0]}: {said}")


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _reason(text: str) -> str:
    return "" if text in ("None", "N/A", "(null)") else text
