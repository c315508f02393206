"""`python -m sft_dist.evaluate RUN_DIR before|after [PLACE/PROCESSES]`: ask and score in a process of its own.

With PLACE it is one of several, answers its share and scores nothing (evaluate/sharing.py starts it so).
"""

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
    run, when, share = (*arguments, "0/1")[:3] if len(arguments) in (2, 3) else ("", "", "")
    place, _, processes = share.partition("/")
    if when not in ("before", "after") or not (place.isdigit() and processes.isdigit() and int(place) < int(processes)):
        sys.stderr.write("usage: python -m sft_dist.evaluate RUN_DIR before|after [PLACE/PROCESSES]\n")
        return 2
    chosen: Literal["before", "after"] = "before" if when == "before" else "after"
    return status_of(lambda: _evaluate(RunDir(Path(run)), chosen, int(place), int(processes)))


def _evaluate(run: RunDir, when: Literal["before", "after"], place: int, processes: int) -> None:
    from sft_dist.parallel.resolve import one_process
    from sft_dist.train.settle import resolve_here, unused_packages

    with leaving_words(run if place == 0 else None, 0):
        config = load_run_config(run.config)
        resolved = resolve_here(one_process(config))
        leave_out(unused_packages(config, resolved))
        from sft_dist.evaluate.compare import answer_share, evaluate_model, load_for
        from sft_dist.evaluate.sharing import devices_for

        loaded = load_for(config, run, resolved, when)
        if place:
            answer_share(config, run, loaded, when, place, processes)
        else:
            evaluate_model(config, run, loaded, when, devices=devices_for(config, resolved))


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1:]))
