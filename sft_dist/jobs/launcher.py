"""Start a run's workers on this machine through torchrun, and pass on what they must hear."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist.jobs.board import board_of
from sft_dist.jobs.grace import Grace
from sft_dist.jobs.host_signs import oom_kills
from sft_dist.jobs.last_words import leave_ending
from sft_dist.jobs.place import Place
from sft_dist.jobs.stacks import catches, state_of
from sft_dist.jobs.watchdog import Watchdog
from sft_dist.parallel.resolve import Resolved
from sft_dist.parallel.world import accelerate_variables
from sft_dist.rundir import RunDir

# The run directory, for workers whose launcher keeps the record of the attempt.
ATTEMPT_HELD = "SFT_DIST_ATTEMPT_HELD"
# Its process id, for the agent of torchrun.
LAUNCHER = "SFT_DIST_LAUNCHER"
# The agent's way to keep no files of its own: else every start leaves empty folders in /tmp.
NO_FILES = ["--log-dir", os.devnull]
# How long torchrun's agent lets workers save before it kills them, were it to end them: half a minute is its default.
PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", "PET_SHUTDOWN_TIMEOUT": "600"}
POLL_S = 0.1
# How often a task looks what the others said, and how long its workers may take to end once it is over elsewhere.
LOOK_S, PATIENCE_S = 1.0, 15.0
# The same once a worker has left before there was anything to save: others may wait for it in a collective, deaf to all else.
EARLY_S = 3.0
STDERR = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def torchrun(resolved: Resolved, arguments: list[str]) -> list[str]:
    """The command that starts the plan's processes on this machine, each with `arguments` after `python`."""
    run = [sys.executable, "-m", "sft_dist.jobs.elastic", "--standalone", *NO_FILES]
    return [*run, "--nproc-per-node", str(resolved.layout.processes_per_node), *arguments]


@dataclass(frozen=True)
class Workers:
    """The processes of one node."""

    count: int
    threads: int | None = None
    """OMP_NUM_THREADS of each, unless it is set; None leaves it."""


def run_workers(run: RunDir, resolved: Resolved, heard: Sequence[int], place: Place | None = None) -> int:
    """Train `run` with the plan's processes and wait for them; the exit status of torchrun.

    The workers stand in a session of their own, so that Ctrl-C reaches only this process: signals are sent to them as
    they are added to `heard`; they agree on a step, save and end, or are killed once their time (`train.stop_timeout`) is up.
    The agent of torchrun does nothing about signals while this process is there (jobs/elastic.py); when it is gone, it has the
    workers save, too. How they ended is in status.json; an exit status does not survive torchrun. In a job `place` is this
    task's, and the other tasks are told to start their share.
    """
    share = Workers(resolved.layout.processes_per_node, resolved.num_threads if resolved.computes_on_host else None)
    if place is None:
        # DeepSpeed prints while it starts: stdout is for the result.
        return _run(run, torchrun(resolved, ["-m", "sft_dist.train", str(run.path)]), share, heard)
    board_of(place).say("train", processes=share.count, threads=share.threads)
    return run_share(run, share, heard, place)


def run_share(run: RunDir, share: Workers, heard: Sequence[int], place: Place) -> int:
    """The workers of this task among those of the job; ends them if another task's have failed or task 0 is through."""
    arguments = ["-m", "sft_dist.train", str(run.path)]
    board = board_of(place)

    def over() -> bool:
        return bool(board.said("failed") or board.said("end"))

    if place.tasks_per_node > 1 or share.count == 1:  # torchrun would only load torch first, for one process to start
        alone = {"RANK": place.task, "WORLD_SIZE": place.tasks, "LOCAL_RANK": place.local_task}
        meeting = {"LOCAL_WORLD_SIZE": place.tasks_per_node, "MASTER_ADDR": place.address, "MASTER_PORT": place.port}
        extra = {name: str(value) for name, value in {**alone, **meeting}.items()}
        before = oom_kills()
        status = _run(run, [sys.executable, *arguments], share, heard, over, extra, place, agent_is_worker=True)
        # Else a stop came before the worker was able to hear it, or it has done all that it was there for.
        if status < 0 and not (is_over(run) or (heard and -status in (signal.SIGTERM, signal.SIGINT))):
            leave_ending(run, place.task, 0, -status, oom_kills=oom_kills() - before)
        return status
    meeting_at = ["--master-addr", place.address, "--master-port", str(place.port), "--max-restarts", "0"]
    where = ["--nnodes", str(len(place.nodes)), "--node-rank", str(place.node), *meeting_at]
    run_it = [sys.executable, "-m", "sft_dist.jobs.elastic", *NO_FILES, *where]
    command = [*run_it, "--nproc-per-node", str(share.count), *arguments]
    return _run(run, command, share, heard, over, place=place)


def _run(
    run: RunDir,
    command: list[str],
    share: Workers,
    heard: Sequence[int],
    over: Callable[[], bool] | None = None,
    extra: Mapping[str, str] | None = None,
    place: Place | None = None,
    *,
    agent_is_worker: bool = False,
) -> int:
    """Start `command` and pass signals on to its workers; once `over`, they have a moment to end by themselves, and once
    one of them has hung, none. The exit status; 137 for a worker that was killed here."""
    watchdog = Watchdog(run, 1 if agent_is_worker else share.count, place)
    strays = accelerate_variables()
    inherited = {name: value for name, value in os.environ.items() if name not in strays}
    held = {ATTEMPT_HELD: str(run.path), LAUNCHER: str(os.getpid())}
    environment = {**PATIENCE, **inherited, **watchdog.environment(inherited), **(extra or {}), **held}
    if share.threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(share.threads))
    agent = subprocess.Popen(command, env=environment, stdout=STDERR, start_new_session=True, preexec_fn=_as_agent)
    passed_on, look, deadline, grace = 0, time.monotonic() + LOOK_S, None, Grace(run, place, heard)
    ended_here = False
    try:
        while agent.poll() is None:
            if len(heard) > passed_on or grace.over():
                workers = [agent.pid] if agent_is_worker else children(agent.pid)
                workers = [pid for pid in workers if state_of(pid) not in "XZ"]
                passed_on += _pass_on(heard[passed_on:], workers)
                if grace.over() and agent.poll() is None:
                    watchdog.give_up(grace.asked, grace.seconds or 0.0, workers)
                    ended_here |= _kill(agent)
            if deadline is None and time.monotonic() > look:
                look = time.monotonic() + LOOK_S
                if over is not None and over():
                    deadline = look + PATIENCE_S
                elif _left_early(run):
                    deadline = look + EARLY_S
            if (deadline is not None and time.monotonic() > deadline) or watchdog.hung():
                ended_here |= _kill(agent)
            time.sleep(POLL_S)  # a blocking wait would not let a handler forward anything
    except BaseException:
        _kill(agent)
        raise
    finally:
        watchdog.close()
    return 128 + signal.SIGKILL if ended_here and agent_is_worker else agent.returncode


def is_over(run: RunDir) -> bool:
    """Whether the processes have come to the end together: all have saved and stop, or the model is complete.

    However one of them ends after that, or whoever started it, the run has not failed.
    """
    status = run.read_status()
    stopped = status.get("state") == "stopped" and status.get("exit_status") == 0
    return stopped or (run.model / "DONE").is_file()


def _left_early(run: RunDir) -> bool:
    """Whether a worker has left because it was told to, without the others: there was nothing to save."""
    try:
        status = run.read_status()
    except (OSError, ValueError):  # a file server that restarts; asked again in a second
        return False
    return status.get("state") == "stopped" and bool(status.get("exit_status"))


def _pass_on(numbers: Sequence[int], workers: Sequence[int]) -> int:
    """Send the workers these signals, and return how many. None as long as one could not hear it.

    Python needs a moment to set its handlers: until then SIGUSR1 and SIGUSR2 are lost, and others kill without a word.
    """
    for sent, number in enumerate(numbers):
        if not workers or not all(catches(worker, number) for worker in workers):
            return sent
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(worker, number)
    return len(numbers)


def run_alone(arguments: list[str]) -> int:
    """Run `python ARGUMENTS` and wait for it; its exit status. It ends with this process, whatever ends that."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=STDERR, start_new_session=True, preexec_fn=end_with_parent
    )
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:  # asked a second time
            process.kill()
            raise
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
    end_with_parent()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Signal `number` to this process when the one that started it is gone, however it went: no training without a record."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _kill(agent: subprocess.Popen[bytes]) -> bool:
    """Whether it was there."""
    there = agent.poll() is None
    if there:
        workers = children(agent.pid)
        agent.kill()  # first: it would put its workers on record as killed by somebody
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        agent.wait()
    return there
