"""torchrun, without its page of traceback when a worker fails: the worker has said what went wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.errors import RunStopped
from sft_dist.jobs.host_signs import oom_kills
from sft_dist.jobs.last_words import leave_ending, leave_words
from sft_dist.jobs.launcher import ATTEMPT_HELD, is_over
from sft_dist.process import begin, libraries_are_in
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Run torchrun with this process's arguments; 1 if a worker failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    libraries_are_in()
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
