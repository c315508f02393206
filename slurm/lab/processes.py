"""Which processes belong to a lab, whatever became of their parents, and how to end them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from layout import MARK, Lab

PROC = Path("/proc")


def read(pid: int | str, name: str) -> bytes:
    """A file of /proc/PID; empty when the process has ended, is the kernel's, or is not ours to look at."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    # The name of the program, in brackets, may hold anything, so count from behind it.
    fields = read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def own_line() -> set[int]:
    """This process and its ancestors: `down` must not saw off the branch that it sits on."""
    line, pid = set(), os.getpid()
    while pid:
        line.add(pid)
        pid = parent_of(pid)
    return line


def belongs(lab: Lab, pid: int) -> bool:
    """Whether a process carries one of the lab's marks. Three are needed.

    Daemons have the tag in their environment. What runs on a node sees the lab's hosts file, also a daemon that left
    its session and cleared its environment. Where nodes have no namespace, only SLURM's own variables are left; a
    shell that merely points at the lab has them not, since SLURMD_NODENAME is set on nodes alone.
    """
    environment = b"\0" + read(pid, "environ")
    if b"\0%s=%s\0" % (MARK.encode(), lab.tag.encode()) in environment:
        return True
    if b"/%s " % lab.hosts_file.name.encode() in read(pid, "mountinfo"):
        return True
    in_job = b"\0SLURM_CLUSTER_NAME=%s\0" % lab.cluster.encode() in environment
    return in_job and b"\0SLURMD_NODENAME=" in environment


def of_lab(lab: Lab) -> list[int]:
    """All living processes of the lab and their descendants, without this one and its ancestors."""
    parents = {int(entry.name): parent_of(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit()}
    living = {pid for pid in parents if not read(pid, "stat").rpartition(b")")[2].startswith(b" Z")}
    mine = own_line()
    found = {pid for pid in living - mine if belongs(lab, pid)}
    while True:
        children = {pid for pid in living - mine - found if parents[pid] in found}
        if not children:
            return sorted(found)
        found |= children


def command_line(pid: int) -> str:
    return read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def end_all(lab: Lab, patience: float) -> list[int]:
    """Kill all processes of the lab until none is left. Returns those that live on after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (left := of_lab(lab)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return left


# --- daemons that `up` started, by name ------------------------------------------------------------------------------


def remember(lab: Lab, name: str, pid: int) -> None:
    (lab.path / "run" / f"{name}.started").write_text(f"{pid} {started(pid)}\n", encoding="utf-8")


def started(pid: int) -> str:
    """When a process began, in clock ticks since the machine's start: tells it from a later one with the same number."""
    fields = read(pid, "stat").rpartition(b")")[2].split()
    return fields[19].decode() if len(fields) > 19 and fields[0] != b"Z" else ""


def remembered(lab: Lab, name: str) -> int | None:
    """The number of a daemon's process while it lives. Works for ordinary users too, who cannot read environments."""
    try:
        pid, _, began = (lab.path / "run" / f"{name}.started").read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return None
    return int(pid) if began and started(int(pid)) == began else None
