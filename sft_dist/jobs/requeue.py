"""What follows when an attempt inside a job has ended: done, requeue, or over; and the record of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft_dist.jobs.place import Place
from sft_dist.rundir import RunDir

# The signals that mean that the cluster wants its nodes back.
TIME_LIMIT, PREEMPTION = signal.SIGUSR2, signal.SIGTERM
NAMES = {TIME_LIMIT: "time limit", PREEMPTION: "preemption"}


@dataclass(frozen=True)
class Verdict:
    """How an attempt goes on record."""

    state: str
    """Of the run, in status.json."""
    reason: str | None
    decided: str
    """In attempts.jsonl: `done`, `next job`, `requeue 1 of 10`, or why it is over."""
    requeue: bool = False


def settler(
    run: RunDir, place: Place
) -> Callable[[str, str | None, int, bool], tuple[str, str | None, dict[str, Any]]]:
    """What an attempt in the job at `place` asks when it has ended (train.attempt.Settle)."""

    def settle(state: str, reason: str | None, number: int, complete: bool) -> tuple[str, str | None, dict[str, Any]]:
        verdict = judge(run, place, state, reason, number, complete=complete)
        return verdict.state, verdict.reason, {**job_facts(place), "decided": verdict.decided}

    return settle


def job_facts(place: Place) -> dict[str, Any]:
    """What the record of an attempt says about its job; an array's task has SLURM's number for it, too."""
    facts: dict[str, Any] = {"job_id": place.job, "restart": place.restart, "nodes": list(place.nodes)}
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        facts["job_id"], facts["slurm_job_id"] = f"{array}_{task}", place.job
    return facts


def judge(run: RunDir, place: Place, state: str, reason: str | None, number: int, *, complete: bool) -> Verdict:
    """`number` is the first signal that was heard, 0 for none; `complete` is whether nothing of the run is left to do."""
    if state == "done":
        return Verdict("done", None, "done") if complete else Verdict("queued", "waits for the next job", "next job")
    if state == "stopped" and run.cancelled.exists():
        return Verdict("stopped", reason, "over: it was cancelled")
    if state != "stopped" or number not in NAMES:
        return Verdict(state, reason, "over: " + ("it failed" if state == "failed" else "it was stopped"))
    why = NAMES[signal.Signals(number)]
    if place.requeues == 0:
        return Verdict("stopped", reason, f"over: {why}, and requeueing is off")
    if place.restart >= place.requeues:
        return Verdict(
            "stopped", f"{reason}; not requeued again", f"over: {why}, requeued {place.restart} times already"
        )
    decided = f"requeue {place.restart + 1} of {place.requeues}"
    return Verdict("queued", f"{reason}; {decided} ({why})", f"{decided}: {why}", requeue=True)
