"""The heartbeat of a process: a few numbers in memory of its node, which its launcher reads. No shared filesystem.

A beat is one write into a mapped page: no system call, so that it costs a microsecond and cannot block. The reader may
meet half a beat; it only asks whether anything has changed.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import shutil
import statistics
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Where the launcher tells its workers to beat.
BEATS = "SFT_DIST_BEATS"
PREFIX = "sft-dist-beats-"
MAGIC = b"sftbeat1"
LAYOUT = struct.Struct("<8sIIQQdd16s")
# In the order in which a process goes through them; from `evaluate` to `optimizer` once for each step.
PHASES = ("start", "prepare", "load", "evaluate", "save", "data", "ask", "step", "optimizer", "publish", "ended")
CYCLE = ("evaluate", "save", "data", "ask", "step", "optimizer")
# The usual time of a step is the median of this many, and nothing before the second: the first one compiles.
REMEMBERED, KNOWN_AFTER = 31, 2
KEPT_S = 2 * 86400.0


@dataclass(frozen=True)
class Beat:
    """What a process last said."""

    pid: int
    rank: int
    count: int
    """Goes up with each beat."""
    step: int
    """Optimizer steps that are done."""
    phase: str
    step_s: float = 0.0
    """Seconds of a usual step; 0 until it is known."""
    save_s: float = 0.0
    """Seconds of the longest save so far; 0 before the first."""

    @property
    def position(self) -> tuple[int, int, int]:
        """How far the process is: of two, the one with the smaller position is behind."""
        order = PHASES.index(self.phase) if self.phase in PHASES else 0
        return (
            (1, self.step, order) if self.phase in CYCLE else (2 if order >= PHASES.index("publish") else 0, 0, order)
        )


class Pulse:
    """The writing side, of one process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank}"
        self.rank = rank
        self.count, self.step, self.phase = 0, 0, "start"
        self.step_s, self.save_s = 0.0, 0.0
        self._recent: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        self._steps = 0
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, mmap.PAGESIZE)
            self._page: mmap.mmap | None = mmap.mmap(handle, mmap.PAGESIZE)
        finally:
            os.close(handle)
        self.beat()

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Say that the process is alive, and where it is if that has changed."""
        self.phase = phase or self.phase
        self.step = self.step if step is None else step
        self.count += 1
        if self._page is not None:
            numbers = (os.getpid(), self.rank, self.count, self.step, self.step_s, self.save_s)
            LAYOUT.pack_into(self._page, 0, MAGIC, *numbers, self.phase.encode())

    def step_took(self, seconds: float) -> None:
        """Count a step among those that say what is usual."""
        self._steps += 1
        if self._steps >= KNOWN_AFTER:
            self._recent.append(seconds)
            self.step_s = statistics.median(self._recent)

    def save_took(self, seconds: float) -> None:
        self.save_s = max(self.save_s, seconds)

    def end(self) -> None:
        """The last beat: nobody waits for this process any more. If its launcher is gone, the file goes, too."""
        if self._page is None:
            return
        self.beat("ended")
        self._page.close()
        self._page = None
        if _is_orphaned(self.path.parent):
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()


def read_beats(folder: Path) -> list[Beat]:
    """What each process of the folder last said, in the order of their ranks; those that have not said anything are left out."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith("rank-"):
                with contextlib.suppress(OSError, struct.error, UnicodeDecodeError):
                    found.append(_parse(Path(entry.path)))
    return sorted((beat for beat in found if beat is not None), key=lambda beat: beat.rank)


def _parse(path: Path) -> Beat | None:
    with path.open("rb", buffering=0) as stream:
        magic, pid, rank, count, step, step_s, save_s, phase = LAYOUT.unpack(stream.read(LAYOUT.size))
    if magic != MAGIC:
        return None
    return Beat(pid, rank, count, step, phase.rstrip(b"\0").decode(), step_s, save_s)


def make_folder() -> Path:
    """A new folder for the beats of this node: in memory where there is such a place, else the temporary folder.

    Those that were left behind, where everyone was killed, go first.
    """
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    for left in where.glob(f"{PREFIX}{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            # A container beside this one has processes that cannot be seen from here.
            if _is_orphaned(left) and time.time() - left.stat().st_mtime > KEPT_S:
                remove_folder(left)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getuid()}-{os.getpid()}-", dir=where))


def _is_orphaned(folder: Path) -> bool:
    """Whether the launcher that made the folder is gone, so that nobody else will remove it."""
    _, _, words = folder.name.partition(PREFIX)
    launcher = words.split("-")[1] if words.count("-") >= 2 else ""
    return launcher.isdigit() and not Path(f"/proc/{launcher}").exists()


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
