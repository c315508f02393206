"""Ends a lab: its jobs, its daemons, its cgroups; and makes sure that they are gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import cgroups
import daemons
import processes
from layout import Lab, LabError


def stop(lab: Lab, *, gently: bool) -> None:
    """End every process of the lab. `gently` lets jobs and daemons finish, so that the lab can go on later.

    Raises LabError with what is left, if something is.
    """
    if any(processes.belongs(lab, pid) for pid in processes.own_line()):
        raise LabError("this shell is a job of the lab: leave it first")
    if gently:
        finish_jobs(lab)
        for name in reversed(daemons.names(lab)):
            finish_daemon(lab, name)
    left = processes.end_all(lab, patience=10)
    if left:
        lines = "".join(f"\n  {pid} {processes.command_line(pid)}" for pid in left)
        raise LabError(f"these processes of the lab could not be ended:{lines}")
    busy = cgroups.remove(lab)
    if busy:
        raise LabError(f"these cgroups of the lab could not be removed: {' '.join(map(str, busy))}")


def finish_jobs(lab: Lab) -> None:
    if processes.remembered(lab, "slurmctld") is None:
        return
    deadline = time.monotonic() + 20
    while jobs := daemons.command(lab, "squeue", "--noheader", "--format=%A").stdout.split():
        daemons.command(lab, "scancel", *jobs)
        if time.monotonic() > deadline:
            return
        time.sleep(0.2)


def finish_daemon(lab: Lab, name: str) -> None:
    pid = processes.remembered(lab, name)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while processes.remembered(lab, name) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
