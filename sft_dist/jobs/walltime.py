"""What a job's time limit leaves for training: from measured times of steps, saves and starts to the jobs still needed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.errors import SftDistError
from sft_dist.files import read_json, write_json
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
# SLURM sends the signal up to a minute before it was asked to (man sbatch, --signal).
EARLY_S = 60.0
# Between the signal and the end lie the rest of a step and a save; both may take longer than ever before. Then the processes
# leave and the job is requeued.
SAFETY, LEAVE_S = 2.0, 15.0
WARM_UP, RECENT = 5, 200


@dataclass(frozen=True)
class Pace:
    """What was measured of a run; plan/pace.json."""

    step_s: float
    """The median of the last steps."""
    save_s: float | None = None
    """The longest save, with the hashing of its files; None before the first."""
    start_s: float | None = None
    """From the start of a worker to its first step."""


@dataclass(frozen=True)
class Outlook:
    """What follows for jobs of one time limit."""

    pace: Pace
    limit_s: float
    delay_s: float
    """How long before the limit the signal comes, as configured."""
    needed_s: float
    """How long before it should come."""
    steps_a_job: int
    jobs: int | None
    """Jobs that the steps that are left take; None if a job does not get to a step."""

    @property
    def last_save_s(self) -> float:
        """Seconds after the start of a job at which the last save should begin at the latest."""
        return max(0.0, self.limit_s - self.needed_s / SAFETY)

    def facts(self) -> dict[str, Any]:
        """The values as JSON."""
        values = asdict(self) | {"last_save_s": self.last_save_s}
        pace = values.pop("pace")
        return {**pace, **{name: round(it, 1) if isinstance(it, float) else it for name, it in values.items()}}


def outlook(pace: Pace, limit_s: float, delay_s: float, steps_left: int) -> Outlook:
    """What a job of `limit_s` seconds that hears the signal `delay_s` before its end can do, and how many `steps_left` take."""
    needed = math.ceil(SAFETY * (pace.step_s + (pace.save_s or 0.0)) + LEAVE_S)
    training = limit_s - delay_s - EARLY_S - (pace.start_s or 0.0)
    steps = max(0, math.floor(training / pace.step_s))
    jobs = math.ceil(steps_left / steps) if steps else None
    return Outlook(pace, limit_s, delay_s, float(needed), steps, 0 if steps_left <= 0 else jobs)


def sentences(found: Outlook, run: str) -> tuple[list[str], list[str]]:
    """The outlook in words, and warnings with their arithmetic and what to type."""
    pace = found.pace
    limit = f"{found.limit_s / 60:.0f} min"
    signal = f"the signal comes {found.delay_s:.0f} to {found.delay_s + EARLY_S:.0f} s before its end"
    fits = f"a job of {limit} holds about {found.steps_a_job} steps of {pace.step_s:.3g} s ({signal})"
    jobs = "1 job" if found.jobs == 1 else f"{found.jobs} jobs"
    lines = [fits + ("" if found.jobs is None else f"; what is left takes about {jobs}")]
    lines.append(f"the last save should begin {found.last_save_s / 60:.1f} min after a job's start at the latest")
    warnings = []
    if found.needed_s > found.delay_s:
        saved = "a save that is not measured yet" if pace.save_s is None else f"a save ({pace.save_s:.1f} s)"
        sum_ = f"{SAFETY:.0f} x (a step ({pace.step_s:.1f} s) + {saved}) + {LEAVE_S:.0f} s = {found.needed_s:.0f} s"
        fix = f"set slurm.signal_delay_s={found.needed_s:.0f}: sft-dist submit {run} slurm.signal_delay_s={found.needed_s:.0f}"
        warnings.append(f"slurm.signal_delay_s is {found.delay_s:.0f}, but {sum_}; {fix}")
    if found.jobs is None:
        start = pace.start_s or 0.0
        sum_ = f"{start:.0f} s to start + {found.delay_s:.0f} + {EARLY_S:.0f} s before the end + a step ({pace.step_s:.1f} s)"
        warnings.append(f"slurm.time is {limit}, and {sum_} do not fit in: set a longer slurm.time")
    return lines, warnings


def run_outlook(run: RunDir, step: int | None, max_steps: int | None) -> Outlook | None:
    """The outlook of a run at this step; None before anything was measured, or where the files do not say."""
    try:
        pace = read_pace(run)
        if pace is None or not max_steps:
            return None
        # Here, because the schema takes a third of the time of a `status` that needs none.
        from sft_dist.config.loader import load_run_config
        from sft_dist.config.rules_slurm import minutes

        slurm = load_run_config(run.config).slurm
    except (OSError, ValueError, SftDistError):
        return None
    limit = minutes(slurm.time)
    if limit is None:
        return None
    return outlook(pace, limit * 60.0, float(slurm.signal_delay_s), max(0, max_steps - (step or 0)))


def outlook_lines(run: RunDir) -> tuple[list[str], list[str]]:
    """The sentences and warnings for a run that starts or goes on in a job now; none before anything was measured."""
    status = run.read_status()
    step, total = status.get("step"), status.get("max_steps")
    known = isinstance(total, int) and (step is None or isinstance(step, int))
    found = run_outlook(run, step, total) if known else None
    return ([], []) if found is None else sentences(found, str(run.path))


def log_outlook(run: RunDir) -> None:
    """Say at the start of an attempt what its job can do."""
    lines, warnings = outlook_lines(run)
    for line in lines:
        log.info("%s", line)
    for line in warnings:
        log.warning("%s", line)


def pace_file(run: RunDir) -> Path:
    return run.plan / "pace.json"


def write_pace(run: RunDir, step_seconds: Sequence[float], save_s: float | None, start_s: float | None) -> None:
    """Put on record what this attempt measured; what it did not, an earlier one may have. A full disk is no reason to fail."""
    steps = list(step_seconds[WARM_UP:] or step_seconds)[-RECENT:]
    if not steps:
        return
    with contextlib.suppress(OSError, ValueError):
        before = read_pace(run)
        pace = Pace(
            round(statistics.median(steps), 4),
            _either(save_s, before.save_s if before else None),
            _either(start_s, before.start_s if before else None),
        )
        write_json(pace_file(run), asdict(pace))


def read_pace(run: RunDir) -> Pace | None:
    """What plan/pace.json says; None if there is none, or it is none."""
    found = read_json(pace_file(run))
    if not isinstance(found, dict) or not _is_number(found.get("step_s")) or found["step_s"] <= 0:
        return None
    values = {name: found.get(name) for name in ("save_s", "start_s")}
    return Pace(
        float(found["step_s"]), **{name: float(it) if _is_number(it) else None for name, it in values.items() if it}
    )


def process_age_s() -> float | None:
    """Seconds since this process was started, before its first line ran; None where the kernel does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 1)
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _either(value: float | None, otherwise: float | None) -> float | None:
    return otherwise if value is None else round(value, 2)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
