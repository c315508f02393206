"""One task of a job: what submitit starts on each node. It hears the signals, starts the processes, and leaves the marker.

Task 0 starts the process that keeps the record of the attempt (`python -m sft_dist.supervise`), which asks before, trains
and asks after. The others wait until it says that the training starts, start their share of the workers, and stay until
task 0 is through: srun ends a step some time after its first task has left. Where processes failed and not a node, all of
it begins anew in the same job.

submitit's own handlers are replaced: they requeue without a save, and ignore SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sft_dist import __version__
from sft_dist.files import read_jsonl, write_text
from sft_dist.jobs.board import board_of
from sft_dist.jobs.grace import Grace
from sft_dist.jobs.host_signs import oom_kills
from sft_dist.jobs.last_words import leave_ending
from sft_dist.jobs.launcher import PATIENCE, PR_SET_PDEATHSIG, Workers, is_over, run_share
from sft_dist.jobs.place import PLACE, Place, find_place
from sft_dist.jobs.requeue import bury, exclude_list
from sft_dist.jobs.script import marker_text
from sft_dist.rundir import RunDir

POLL_S = 0.1
LOOK_S = 1.0
# For so long a task that waits for the first one's word looks often, since others wait for it.
SOON_S = 60.0
# How long task 0 waits for the others before it ends, and they for it once its word came.
LEAVE_S = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True)
class NodeJob:
    """What submitit pickles: importable, and nothing but plain values inside, so that an image's Python can load it."""

    spec: Mapping[str, Any]

    def __call__(self) -> None:
        heard: list[int] = []
        for number in SIGNALS:
            signal.signal(number, _note(heard))
        os.environ.update(job_environment(self.spec, os.environ))
        place = find_place(self.spec, os.environ)
        os.environ[PLACE] = place.to_text()
        refuse_other_version(self.spec, place)
        if place.task == 0:
            _begun(place, place.run)
        # SystemExit, so that submitit leaves no result: a later look would take it for the end of a requeued job.
        sys.exit(_lead(place, heard) if place.task == 0 else _follow(place, heard))


def job_environment(spec: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """Variables for everything that the task starts; what the user has set stays."""
    scratch = os.path.expandvars(str(spec.get("local_scratch") or tempfile.gettempdir()))
    caches = Path(scratch) / f"sft-dist-{os.getuid()}"
    defaults = {
        **{str(name): str(value) for name, value in spec.get("env", {}).items()},
        # On a network file system compilers' caches fail with stale handles, and each process waits for the others.
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        **PATIENCE,
    }
    of_image = spec.get("image_sets", ())
    return {name: value for name, value in defaults.items() if name not in env or name in of_image}


def refuse_other_version(spec: Mapping[str, Any], place: Place) -> None:
    """SystemExit, with the reason on record, if the job's image holds another version than the one that submitted it."""
    if spec.get("package", __version__) == __version__:
        return
    reason = f"the image holds sft-dist {__version__}, and the job was submitted with {spec['package']}"
    if place.task == 0:
        RunDir(Path(place.run)).write_status(state="failed", reason=reason, exit_status=3)
    sys.stderr.write(f"error: {reason}\n  build the image from that version: docs/containers.md\n")
    sys.exit(3)


def _note(heard: list[int]) -> Any:
    def handler(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    return handler


def _lead(place: Place, heard: list[int]) -> int:
    """Task 0: keep the record by way of a process of its own; exit status 0 if the job did what it was there for."""
    while True:
        status, decided = _supervised(place, heard)
        again = decided.startswith("again")
        requeue = decided.startswith("requeue")
        if requeue:
            _ask_for_requeue(place)
        if not again:
            _begun(place, "")
        gathered = _end(place, again=again)
        if not again:
            return 0 if requeue else abs(status)
        place = _anew(place)
        if not gathered:  # a node may be what has failed: SLURM knows others
            _ask_for_requeue(place)
            _end(place)
            return 0


def _end(place: Place, *, again: bool = False) -> bool:
    """Tell the other tasks that the attempt is over, and whether another follows here; whether all of them have heard."""
    board, deadline = board_of(place), time.monotonic() + LEAVE_S
    board.say("end", again=again)
    while len(board.said("left")) < place.tasks - 1 and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return len(board.said("left")) >= place.tasks - 1


def _ask_for_requeue(place: Place) -> None:
    """Leave the marker for the batch script."""
    run = RunDir(Path(place.run))
    if place.marker:
        write_text(
            Path(place.marker), marker_text(place.run, exclude_list(run, read_jsonl(run.attempts)[-1].get("job_id")))
        )


def _begun(place: Place, run: str) -> None:
    """Tell the batch script that this task hears signals; it names the run for as long as it has not decided what follows."""
    if place.marker:
        with contextlib.suppress(OSError):  # a full disk is for the run to say
            write_text(Path(f"{place.marker}.begun"), f"{run}\n")


def _supervised(place: Place, heard: list[int]) -> tuple[int, str]:
    """One attempt: the exit status of the process that kept its record, and what was decided, empty if nothing was."""
    board, run = board_of(place), RunDir(Path(place.run))
    before, kills = len(read_jsonl(run.attempts)), oom_kills()
    supervisor = subprocess.Popen([sys.executable, "-m", "sft_dist.supervise", place.run], preexec_fn=_hold_signals)
    passed_on, grace = 0, Grace(run, place, heard)
    while supervisor.poll() is None:
        for number in heard[passed_on:]:
            passed_on += 1
            supervisor.send_signal(number)
        if grace.over() and not board.said("train"):  # it trains itself, and nobody else ends it
            supervisor.kill()
            supervisor.wait()
            bury(run, place, now=True, asked=heard[0])
        time.sleep(POLL_S)
    if supervisor.returncode < 0:  # killed: it has left no record, and its workers save and end
        deadline = time.monotonic() + LEAVE_S
        while board.said("train") and run.read_status().get("state") == "running" and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        leave_ending(run, None, supervisor.pid, -supervisor.returncode, oom_kills=oom_kills() - kills)
        bury(run, place, now=True)
    lines = read_jsonl(run.attempts)
    return supervisor.returncode, str(lines[-1].get("decided", "")) if len(lines) > before else ""


def _anew(place: Place) -> Place:
    """The place for the next beginning in this job, also for what is started from here."""
    place = place.anew()
    os.environ[PLACE] = place.to_text()
    return place


def _follow(place: Place, heard: list[int]) -> int:
    """Another task: its share of the workers while task 0 says so. Its exit status is 0: what failed is said otherwise."""
    while True:
        _share(place, heard)
        board, began = board_of(place), time.monotonic()
        while not (ended := board.said("end")):
            _pause(began)
        board.say("left")
        if not ended[-1].get("again"):
            return 0
        place = _anew(place)


def _pause(began: float) -> None:
    """Between two looks for a word that has been waited for since `began`: it comes at once, or in hours."""
    time.sleep(POLL_S if time.monotonic() - began < SOON_S else LOOK_S)


def _share(place: Place, heard: list[int]) -> None:
    """This task's part of one attempt, if it comes to that; says what failed here."""
    board, run = board_of(place), RunDir(Path(place.run))
    began = time.monotonic()
    while not (started := board.said("train")) and not board.said("end"):
        _pause(began)
    if started and not board.said("end"):
        share = Workers(int(started[-1]["processes"]), started[-1].get("threads"))
        status = run_share(run, share, heard, place)
        # The agent was hit by the signal, too, before it had a handler or after, or did not end and was killed.
        by_signal = {code for number in (*heard, signal.SIGTERM) for code in (128 + number, -number)}
        asked = bool(heard) and (status in by_signal or bool(board.said("overdue")))
        if status != 0 and not asked and not board.said("end"):
            # Task 0 must hear of it in any case: its agent waits for the one here.
            if run.read_status().get("state") != "failed" and not is_over(run):
                reason = f"the processes on {place.nodes[place.node]} ended with exit status {status}"
                run.write_status(state="failed", reason=reason, exit_status=1)
            board.say("failed", status=status)


def _hold_signals() -> None:
    """Before the supervisor starts: signals wait until it can put them on record; it ends with this task."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
