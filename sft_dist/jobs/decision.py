"""What follows from a failure: another attempt, one without a node, or none; attempts that get nowhere come to an end."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.jobs.failures import Failure
from sft_dist.jobs.records import Row, last_rows, whole
from sft_dist.rundir import RunDir

# Another attempt would end in the same way, or nobody wants one.
NEVER = {"config", "data", "out_of_memory", "disk", "numbers", "checkpoint", "cancelled"}
# Attempts in a row without progress after which there is no other. Who is preempted or out of time did nothing wrong, but
# must reach a save at some time.
FRUITLESS, FRUITLESS_IF_ASKED = 2, 3
ASKED = {"preemption", "time_limit"}
# What new processes on the same nodes may well be spared; what is wrong with a node comes back, and then another one helps.
ANEW = {"unknown", "network", "hang"}
WORDS = {"time_limit": "time limit", "out_of_memory": "out of memory"}
NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,253}")

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Decision:
    """What follows."""

    requeue: bool
    text: str
    """For attempts.jsonl: `requeue 1 of 10: hang`, `again in this job: hang`, `over: config`."""
    why: str = ""
    """For the user, where it is not what the failure itself says."""
    without: str | None = None
    """The node that the next attempt must not get."""
    here: bool = False
    """The next attempt begins at once, in the same job on the same nodes."""


def decide(
    failure: Failure,
    history: History,
    max_requeues: int,
    restart: int,
    *,
    spare: bool = True,
    stays: bool = False,
) -> Decision:
    """`history` holds the run's lines of attempts.jsonl, this attempt's last; `restart` is how often the run began anew.

    Without `spare` the job cannot do without any of its nodes, since its user has named them. With `stays` the job could go
    on: it does once an attempt got further than all before, so that it leaves nodes on which nothing succeeds.
    """
    word = WORDS.get(failure.kind, failure.kind)
    if failure.kind == "cancelled":
        return Decision(False, "over: it was cancelled")
    if failure.kind in NEVER:
        return Decision(False, f"over: {word}, which another attempt does not change")
    if max_requeues == 0:
        return Decision(False, f"over: {word}, and requeueing is off")
    if restart >= max_requeues:
        return Decision(False, f"over: {word}, requeued {restart} times already", "not requeued again")
    limit = FRUITLESS_IF_ASKED if failure.kind in ASKED else FRUITLESS
    fruitless = without_progress(history)
    if fruitless >= limit:
        why = f"{fruitless} attempts in a row without progress"
        if failure.kind in ASKED:
            why += "; it needs longer jobs (slurm.time) or more frequent saves (checkpoint.save_steps)"
        return Decision(False, f"over: {word}, {fruitless} attempts in a row without progress", why)
    if stays and not fruitless and failure.kind in ANEW:
        return Decision(False, f"again in this job: {word}", "again in this job", here=True)
    without = failure.node if failure.kind == "node" and spare else None
    without = without if without and NODE_NAME.fullmatch(without) else None
    count = f"requeue {restart + 1} of {max_requeues}"
    return Decision(True, f"{count}{f' without {without}' if without else ''}: {word}", count, without)


def without_progress(history: History) -> int:
    """How many attempts of the same job at the end of `history` got no further than any before them."""
    best = (0, 0, 0)
    fruitless = 0
    job = history[-1].get("job_id") if history else None
    for line in history:
        reached = _reached(line)
        further = any(now > before for now, before in zip(reached, best, strict=True))
        best = (max(best[0], reached[0]), max(best[1], reached[1]), max(best[2], reached[2]))
        # A job that was submitted again starts anew: its user may have changed something.
        fruitless = 0 if further or line.get("job_id") != job else fruitless + 1
    return fruitless


def reached(run: RunDir) -> dict[str, int]:
    """How far the run has come: its last step, that of its newest complete checkpoint, and how many stages are done."""
    complete = [0]
    for path in run.checkpoints.glob("checkpoint-*/MANIFEST.json"):
        number = path.parent.name.rpartition("-")[2]
        complete.append(int(number) if number.isascii() and number.isdigit() else 0)
    rows: Sequence[Row] = ()
    with contextlib.suppress(OSError):
        rows = last_rows(run.metrics)
    # status.json is some seconds late where the process was killed.
    steps = (whole(it.get("step")) or 0 for it in (run.read_status(), *rows[-1:]))
    stages = (run.eval / "before.jsonl", run.model / "DONE", run.eval / "after.jsonl")
    done = sum(path.is_file() for path in stages)
    return {"step": max(*steps, max(complete)), "checkpoint": max(complete), "stages": done}


def excluded(history: History, job_id: str | None) -> tuple[str, ...]:
    """The nodes that earlier attempts of this job were to do without."""
    names = [line.get("without") for line in history if line.get("job_id") == job_id]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and NODE_NAME.fullmatch(name)))


def _reached(line: Mapping[str, Any]) -> tuple[int, int, int]:
    found = line.get("reached")
    found = found if isinstance(found, Mapping) else {"step": line.get("last_step")}
    step, checkpoint, stages = (found.get(name) for name in ("step", "checkpoint", "stages"))
    return tuple(value if isinstance(value, int) else 0 for value in (step, checkpoint, stages))  # type: ignore[return-value]
