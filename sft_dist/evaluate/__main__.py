"""`python -m sft_dist.evaluate RUN_DIR before|after`: ask and score in a process of its own, on one device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from sft_dist.config.loader import load_run_config
from sft_dist.jobs.last_words import leaving_words
from sft_dist.logs import log_to_stderr
from sft_dist.process import begin, leave_out, status_of
from sft_dist.rundir import RunDir


def main(arguments: list[str]) -> int:
    """Write eval/WHEN.jsonl and scores.json of the run; the exit status is that of the error."""
    log_to_stderr()
    if len(arguments) != 2 or arguments[1] not in ("before", "after"):
        sys.stderr.write("usage: python -m sft_dist.evaluate RUN_DIR before|after\n")
        return 2
    when: Literal["before", "after"] = "before" if arguments[1] == "before" else "after"
    return status_of(lambda: _evaluate(RunDir(Path(arguments[0])), when))


def _evaluate(run: RunDir, when: Literal["before", "after"]) -> None:
    from sft_dist.parallel.resolve import one_process
    from sft_dist.train.settle import resolve_here, unused_packages

    with leaving_words(run, 0):
        config = load_run_config(run.config)
        resolved = resolve_here(one_process(config))
        leave_out(unused_packages(config, resolved))
        from sft_dist.evaluate.compare import evaluate_model, load_for

        evaluate_model(config, run, load_for(config, run, resolved, when), when)


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1:]))
