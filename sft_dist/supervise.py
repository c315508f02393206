"""`python -m sft_dist.supervise RUN_DIR`: the process of a job's first task that keeps the record of the attempt."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from sft_dist.jobs.place import Place, handed_place
from sft_dist.logs import log_to_stderr
from sft_dist.process import begin, status_of
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here

# Longer than it takes until processes that have lost those of other nodes are ended as hung.
HELD_S, LOOK_S = 1800.0, 1.0


def main(arguments: list[str]) -> int:
    """Do the job's part of the run; the exit status is that of the error, as `sft-dist` gives it."""
    log_to_stderr()
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m sft_dist.supervise RUN_DIR\n")
        return 2
    run = RunDir(Path(arguments[0]))
    if run.cancelled.exists():  # between the requeue and this start
        sys.stderr.write(f"run {run.name} was cancelled; go on with: sft-dist submit {run.quoted}\n")
        run.write_status(state="stopped", reason="cancelled")
        return 0
    place = handed_place()
    _wait_for_the_start_before(run, place)
    return status_of(lambda: run_here(run, place))


def _wait_for_the_start_before(run: RunDir, place: Place | None) -> None:
    """Until a requeued job's processes of before have let go of the run: SLURM may have given up a node that is still at work.

    Not once a signal waits that asks for a stop.
    """
    if place is None or not place.restart:
        return
    deadline = time.monotonic() + HELD_S
    while run.held() and time.monotonic() < deadline and not signal.sigpending():
        time.sleep(LOOK_S)


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1:]))
