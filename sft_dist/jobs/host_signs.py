"""What the kernel of this host lets us know: processes killed for memory in our cgroup, and lines about GPUs and kills."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
KMSG = Path("/dev/kmsg")
MAX_LINES = 20
# A ring buffer of many kernels holds a few thousand records.
MAX_RECORDS = 20_000
_TELLING = re.compile(r"NVRM: Xid |[Oo]ut of memory: Killed process ")


def oom_kills(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int:
    """How many processes the kernel has killed for memory in this process's cgroup and, in a job, those of the job above it.

    Both versions of cgroups; 0 where neither can be read. The count is since the cgroup was made: compare two.
    """
    try:
        entries = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    counts = [0]
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers == "memory":
            counts += [_count(folder / "memory.oom_control") for folder in _up_to_job(root / "memory", path)]
        elif not controllers:
            for base in (root, root / "unified"):
                counts += [_count(folder / "memory.events") for folder in _up_to_job(base, path)]
    # Version 2 counts a kill at every level above it, too.
    return max(counts)


def kernel_lines(since: float, path: Path = KMSG) -> tuple[str, ...]:
    """Lines of the kernel's log about GPU errors and kills for memory, since the time `since` of time.monotonic()."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # most sites let only root read it
        return ()
    found: list[str] = []
    try:
        for _ in range(MAX_RECORDS):
            try:
                record = os.read(handle, 8192).decode("utf-8", "replace")
            except BrokenPipeError:  # overwritten while it was read
                continue
            except OSError:  # no more
                break
            if not record:
                break
            head, _, text = record.partition(";")
            fields = head.split(",")
            if len(fields) > 2 and fields[2].isdigit() and int(fields[2]) / 1e6 >= since and _TELLING.search(text):
                found.append(text.splitlines()[0].strip()[:500])
    finally:
        os.close(handle)
    return tuple(found[-MAX_LINES:])


def now() -> float:
    """The time that `kernel_lines` compares with."""
    return time.monotonic()


def _up_to_job(base: Path, path: str) -> list[Path]:
    """The folder of a cgroup and, if it belongs to a job of SLURM, those above it up to the job's."""
    folder = base / path.lstrip("/")
    parts = [folder, *folder.parents]
    job = next((number for number, part in enumerate(parts) if part.name.startswith("job_")), 0)
    return parts[: job + 1]


def _count(path: Path) -> int:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
