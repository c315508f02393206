"""Questions shared out among the GPUs of this machine: each answers every n-th batch, and one process scores them all.

Batches are those of one process, so that the answers are, too, whatever the number of GPUs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sft_dist.config.schema import Config
from sft_dist.evaluate.asked import Asked, prompts_at_once
from sft_dist.jobs.launcher import STDERR, end_with_parent
from sft_dist.parallel.machine import this_machine
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from sft_dist.evaluate.compare import When
    from sft_dist.parallel.resolve import Resolved

log = logging.getLogger(__name__)
# One process for so many batches at least: each loads the model first.
BATCHES = 4
# Seconds that a process has to end once it was asked to.
PATIENCE_S = 10.0


def devices_for(config: Config, resolved: Resolved) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES of each process that may answer, the first for this one; () where the plan is for one."""
    if resolved.use_cpu or config.parallel.plan == "single" or config.parallel.num_processes == 1:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(","))
    return tuple(map(str, range(len(this_machine().gpus))))


def worth_it(devices: Sequence[str], config: Config, prompts: int) -> Sequence[str]:
    """As many of the `devices` as have something to do; [] if one is enough."""
    wanted = prompts // (BATCHES * prompts_at_once(config.evaluate.generation, generates_on_gpu=True))
    return devices[:wanted] if wanted > 1 and len(devices) > 1 else ()


def share_out(run: RunDir, when: When, asked: Asked, devices: Sequence[str], answer: Callable[[], object]) -> None:
    """Have a process on each of the `devices` but the first answer its share, and `answer` this one's; gather all of it.

    What a process that failed leaves out is missing in `asked`, and will be asked here.
    """
    with _others(run, when, devices) as others:
        with asked.only(0, len(devices)):
            answer()
        for device, process in others.items():
            if (status := process.wait()) != 0:
                log.warning(
                    "the process that answers on GPU %s ended with exit status %d; what it left is asked here",
                    device,
                    status,
                )
    asked.gather()


@contextmanager
def _others(run: RunDir, when: When, devices: Sequence[str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The started processes by device; those that are still there at the end are ended."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for place, device in enumerate(devices):
            if place:
                command = [sys.executable, "-m", "sft_dist.evaluate", str(run.path), when, f"{place}/{len(devices)}"]
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
                started[device] = subprocess.Popen(
                    command, env=environment, stdout=STDERR, start_new_session=True, preexec_fn=end_with_parent
                )
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
        for process in started.values():
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
