"""How long a run that was told to stop may take for it, before whoever started its processes ends them."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sft_dist.config.loader import load_run_config
from sft_dist.errors import SftDistError
from sft_dist.jobs.place import Place
from sft_dist.jobs.walltime import LEAVE_S, SAFETY, read_pace
from sft_dist.rundir import RunDir

# What is kept of the time for the stacks, the record and a requeue.
RESERVE_S = LEAVE_S
# Where nothing follows that would end the run: long enough for a large save, not for ever.
UNHURRIED_S = 600.0
# These announce an end that SLURM puts to the job; the others are a person's.
FROM_SLURM = (signal.SIGUSR2, signal.SIGTERM)


def grace_s(run: RunDir, place: Place | None, number: int) -> float | None:
    """Seconds that the processes have to save and end after the signal `number`; None if that has no end.

    `train.stop_timeout`, less what the end itself takes. `auto` is SLURM's lead (slurm.signal_delay_s) where SLURM asked, else
    ten minutes, or what the measured times of a step and a save need if that is longer.
    """
    try:
        config = load_run_config(run.config)
        pace = read_pace(run)
    except (SftDistError, OSError, ValueError):
        return UNHURRIED_S
    asked = config.train.stop_timeout
    if asked is None:
        return None
    if asked == "auto":
        if place is None or not place.marker or number not in FROM_SLURM:
            needed = 0.0 if pace is None else SAFETY * (pace.step_s + (pace.save_s or 0.0)) + LEAVE_S
            return max(UNHURRIED_S, needed)
        asked = config.slurm.signal_delay_s
    return max(asked / 2, asked - RESERVE_S)


@dataclass
class Grace:
    """The time that is left to the processes of `run` once a signal stands in `heard`."""

    run: RunDir
    place: Place | None
    heard: Sequence[int]
    seconds: float | None = field(default=None, init=False)
    _end: float | None = field(default=None, init=False)

    @property
    def asked(self) -> str:
        """Name of the first signal."""
        return signal.Signals(self.heard[0]).name

    def over(self) -> bool:
        """Whether the time is up. It begins when this is first asked after a signal."""
        if self._end is None and len(self.heard):
            self.seconds = grace_s(self.run, self.place, self.heard[0])
            self._end = float("inf") if self.seconds is None else time.monotonic() + self.seconds
        return self._end is not None and time.monotonic() >= self._end
