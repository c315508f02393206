"""Start a run's workers on this machine through torchrun, and pass on what they must hear."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sft_dist.parallel.resolve import Resolved
from sft_dist.rundir import RunDir

# The run directory, for workers whose launcher keeps the record of the attempt.
ATTEMPT_HELD = "SFT_DIST_ATTEMPT_HELD"
POLL_S = 0.1
STDERR = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def torchrun(resolved: Resolved, arguments: list[str]) -> list[str]:
    """The command that starts the plan's processes on this machine, each with `arguments` after `python`."""
    run = [sys.executable, "-m", "sft_dist.jobs.elastic", "--standalone"]
    return [*run, "--nproc-per-node", str(resolved.layout.processes_per_node), *arguments]


def run_workers(run: RunDir, resolved: Resolved, heard: Sequence[int]) -> int:
    """Train `run` with the plan's processes and wait for them; the exit status of torchrun.

    The workers stand in a session of their own, so that Ctrl-C reaches only this process, and the agent of torchrun,
    which would kill them after 30 s, hears nothing of it: signals are sent to the workers as they are added to `heard`;
    they agree on a step, save and end. They do so too, within the agent's 30 s, if this process is killed. How they ended
    is in status.json; an exit status does not survive torchrun.
    """
    environment = {**os.environ, ATTEMPT_HELD: str(run.path)}
    if resolved.use_cpu:
        environment.setdefault("OMP_NUM_THREADS", str(resolved.num_threads))
    command = torchrun(resolved, ["-m", "sft_dist.train", str(run.path)])
    # DeepSpeed prints while it starts: stdout is for the result.
    agent = subprocess.Popen(command, env=environment, stdout=STDERR, start_new_session=True, preexec_fn=_as_agent)
    passed_on = 0
    try:
        while agent.poll() is None:
            workers = children(agent.pid) if len(heard) > passed_on else []
            for number in heard[passed_on:] if workers else ():  # until there are workers, nobody would hear it
                passed_on += 1
                for worker in workers:
                    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                        os.kill(worker, number)
            time.sleep(POLL_S)  # a blocking wait would not let a handler forward anything
    except BaseException:
        _kill(agent)
        raise
    return agent.returncode


def run_alone(arguments: list[str]) -> int:
    """Run `python ARGUMENTS` and wait for it; its exit status. It ends with this process, whatever ends that."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=STDERR, start_new_session=True, preexec_fn=_end_with_parent
    )
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process.returncode


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid`; read from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.name))
    return found


def _as_agent() -> None:
    """Before torchrun starts: signals whose default would end it are ignored until a worker sets its own handlers."""
    _end_with_parent()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    """SIGTERM to this process when the one that started it is gone, however it went: no training without its record."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    if agent.poll() is None:
        for worker in children(agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        agent.kill()
        agent.wait()
