"""`python -m sft_dist.supervise RUN_DIR`: the process of a job's first task that keeps the record of the attempt."""

from __future__ import annotations

import sys
from pathlib import Path

from sft_dist.jobs.place import handed_place
from sft_dist.logs import log_to_stderr
from sft_dist.process import begin, status_of
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here


def main(arguments: list[str]) -> int:
    """Do the job's part of the run; the exit status is that of the error, as `sft-dist` gives it."""
    log_to_stderr()
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m sft_dist.supervise RUN_DIR\n")
        return 2
    run = RunDir(Path(arguments[0]))
    if run.cancelled.exists():  # between the requeue and this start
        sys.stderr.write(f"run {run.name} was cancelled; go on with: sft-dist submit {run.path}\n")
        run.write_status(state="stopped", reason="cancelled")
        return 0
    return status_of(lambda: run_here(run, handed_place()))


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1:]))
