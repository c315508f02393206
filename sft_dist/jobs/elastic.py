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
from sft_dist.jobs.launcher import ATTEMPT_HELD
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
        # A killed worker cannot say so, and the others only say that they miss it.
        asked = (-signal.SIGINT, -signal.SIGTERM)  # a stop, before the worker was able to hear it
        killed = [(rank, it) for rank, it in error.failures.items() if it.exitcode < 0 and it.exitcode not in asked]
        for rank, failure in killed[:1]:
            reason = f"rank {rank} (process {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
            if ATTEMPT_HELD in os.environ:
                run = RunDir(Path(os.environ[ATTEMPT_HELD]))
                leave_ending(run, rank, failure.pid, -failure.exitcode, oom_kills=oom_kills() - before)
                run.write_status(state="failed", reason=reason, exit_status=1)
            else:  # a job script of someone's own: the first worker keeps the record, if it is not the one
                sys.stderr.write(f"error: {reason}\n")
        if not killed:
            _correct(error)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:  # its own: a port that is taken, hosts that do not find each other
        held = os.environ.get(ATTEMPT_HELD)
        if held is None:
            raise
        leave_words(RunDir(Path(held)), error)
        RunDir(Path(held)).write_status(state="failed", reason=f"torchrun: {error}".splitlines()[0], exit_status=1)
        return 1
    return 0


def _correct(error: ChildFailedError) -> None:
    """A worker that leaves early because the agent ends it says so as if it had been asked to; but another one had failed."""
    held = os.environ.get(ATTEMPT_HELD)
    own = [(rank, it) for rank, it in error.failures.items() if it.exitcode > 0 and it.exitcode != RunStopped.exit_code]
    if held is None or not own or RunDir(Path(held)).read_status().get("state") != "stopped":
        return
    rank, failure = own[0]
    reason = f"rank {rank} (process {failure.pid}) ended with exit status {failure.exitcode}"
    RunDir(Path(held)).write_status(state="failed", reason=reason, exit_status=failure.exitcode)


if __name__ == "__main__":
    begin()
    sys.exit(main())
