"""The signs of life of this process: where it is, for the launcher that watches it; its stacks when asked, or on a crash.

One process is one rank, so there is one pulse, and code that takes long says `phase("load")` without being handed anything.
Without a launcher of ours nothing watches, and a call here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
from pathlib import Path
from typing import TextIO

from sft_dist.jobs.beats import BEATS, Pulse
from sft_dist.jobs.stacks import DUMP_SIGNAL, stacks_file

_pulse: Pulse | None = None
_stacks: TextIO | None = None  # faulthandler writes to its descriptor for as long as the process lives


def begin(rank: int, run: Path | None) -> None:
    """Start to beat as `rank` if a launcher watches; `run` is the run directory, for stacks. Once, early in the process."""
    global _pulse
    folder = os.environ.get(BEATS)
    if folder:
        # Without a place to beat the training goes on unwatched.
        with contextlib.suppress(OSError):
            _pulse = Pulse(Path(folder), rank)
    _answer_with_stacks(None if run is None else stacks_file(run / "logs", rank))
    atexit.register(end)


def phase(name: str, step: int | None = None) -> None:
    """This process is now in this phase (one of jobs.beats.PHASES), with so many steps done."""
    if _pulse is not None:
        _pulse.beat(name, step)


def pulse() -> Pulse | None:
    """The pulse of this process, if somebody watches it."""
    return _pulse


def end() -> None:
    """The last beat; a file for stacks that nothing was written to goes."""
    global _pulse, _stacks
    if _pulse is not None:
        _pulse.end()
        _pulse = None
    if _stacks is not None:
        faulthandler.disable()
        faulthandler.unregister(DUMP_SIGNAL)
        path, _stacks = Path(_stacks.name), None
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()


def _answer_with_stacks(path: Path | None) -> None:
    """All threads' stacks into `path` on DUMP_SIGNAL and on a crash such as SIGSEGV; to stderr where it cannot be written.

    From C, inside the signal handler: Python need not be able to run.
    """
    global _stacks
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _stacks = path.open("a", encoding="utf-8")
    if _stacks is None:
        with contextlib.suppress(OSError, RuntimeError):  # stderr may be no file, or none at all
            if not faulthandler.is_enabled():
                faulthandler.enable()
        return
    faulthandler.enable(_stacks)
    faulthandler.register(DUMP_SIGNAL, _stacks, all_threads=True, chain=False)
