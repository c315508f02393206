"""torchrun, without its page of traceback when a worker fails: the worker has said what went wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sft_dist.errors import ConfigError, RunStopped
from sft_dist.jobs.host_signs import oom_kills
from sft_dist.jobs.last_words import leave_ending, leave_words
from sft_dist.jobs.launcher import ATTEMPT_HELD, LAUNCHER, is_over
from sft_dist.process import begin, libraries_are_in
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


# Holds the run of a launcher that is gone.
_until_the_end = contextlib.ExitStack()


def main() -> int:
    """Run torchrun with this process's arguments; 1 if a worker failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    libraries_are_in()
    _leave_signals_to(os.environ.get(LAUNCHER))
    logging.disable(logging.ERROR)  # "Sending process ... closing signal": what matters is in status.json
    before = oom_kills()
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        _put_down(error, oom_kills() - before)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:  # its own: a port that is taken, hosts that do not find each other
        held = os.environ.get(ATTEMPT_HELD)
        if held is None:
            raise
        run = RunDir(Path(held))
        if not is_over(run):
            leave_words(run, error)
            run.write_status(state="failed", reason=f"torchrun: {error}".splitlines()[0], exit_status=1)
        return 1
    return 0


def _leave_signals_to(launcher: str | None) -> None:
    """Do nothing about signals while the process `launcher` is there, which passes them on; None leaves torchrun's way.

    A signal that hits all processes of a job would else come to the workers twice, and a save that takes longer than the
    agent waits would be ended. When the launcher has gone, which comes as SIGTERM, the agent ends with the workers. They save,
    and the run is held until they have; what comes meanwhile would end that.
    """
    if launcher is None:
        return
    ending = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        if ending or os.getppid() == int(launcher):
            return
        ending = True
        _hold_instead_of(launcher)
        raise SystemExit(128 + number)  # torchrun sends SIGTERM to the workers and waits for them, whatever ends it

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hear)
    # --signals-to-handle: else it puts handlers of its own in their place.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"


def _hold_instead_of(launcher: str) -> None:
    """Hold the run until this process ends, if it was the process `launcher` that held it: no other may begin beside it."""
    held = os.environ.get(ATTEMPT_HELD)
    if held is None:
        return
    run = RunDir(Path(held))
    with contextlib.suppress(OSError, ConfigError):  # somebody else was faster
        if run.lock.read_text(encoding="utf-8").split() == ["process", launcher, "on", socket.gethostname()]:
            _until_the_end.enter_context(run.locked())


def _put_down(error: ChildFailedError, kills: int) -> None:
    """What a worker that failed cannot say itself, or says wrongly; nothing if all had come to the end by then."""
    held = os.environ.get(ATTEMPT_HELD)
    run = RunDir(Path(held)) if held else None
    asked = (-signal.SIGINT, -signal.SIGTERM)  # a stop, before the worker was able to hear it
    killed = [(rank, it) for rank, it in error.failures.items() if it.exitcode < 0 and it.exitcode not in asked]
    for rank, failure in killed[:1]:
        reason = f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
        if run is None:  # a job script of someone's own: the first worker keeps the record, if it is not the one
            sys.stderr.write(f"error: {reason}\n")
        elif is_over(run):
            sys.stderr.write(f"{reason} on its way out; the training had ended before\n")
        else:  # the others only say that they miss it
            leave_ending(run, rank, failure.pid, -failure.exitcode, oom_kills=kills)
            run.write_status(state="failed", reason=reason, exit_status=1)
    if not killed and run is not None and not is_over(run):
        _correct(run, error)


def _correct(run: RunDir, error: ChildFailedError) -> None:
    """A worker that leaves early because the agent ends it says so as if it had been asked to; but another one had failed."""
    own = [(rank, it) for rank, it in error.failures.items() if it.exitcode > 0 and it.exitcode != RunStopped.exit_code]
    if not own or run.read_status().get("state") != "stopped":
        return
    rank, failure = own[0]
    reason = f"rank {rank} (process {failure.pid}) ended with exit status {failure.exitcode}"
    run.write_status(state="failed", reason=reason, exit_status=failure.exitcode)


if __name__ == "__main__":
    begin()
    sys.exit(main())
