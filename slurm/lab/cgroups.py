"""The machine's cgroups, as far as proctrack/cgroup needs them, and what SLURM leaves behind there."""

from __future__ import annotations

import os
import time
from pathlib import Path

from layout import Lab

MOUNT = Path("/sys/fs/cgroup")
# Is there while systemd runs. Without it SLURM must be told not to ask it for a scope (version 2 only).
SYSTEMD = Path("/run/systemd/system")


def unified() -> bool:
    """Whether this machine has version 2 alone. SLURM finds version 1 by itself, also in a mixed hierarchy."""
    return (MOUNT / "cgroup.controllers").exists()


def unusable() -> str | None:
    """Why SLURM cannot track processes by cgroups here; None if it can."""
    home = MOUNT if unified() else MOUNT / "freezer"
    if not home.is_dir():
        return f"there is neither {MOUNT}/cgroup.controllers (version 2) nor {home} (version 1)"
    probe = home / f"sft-dist-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no cgroup can be made in {home} ({error.strerror}): a container without the right to?"
    return None


def remove(lab: Lab) -> list[Path]:
    """Remove the cgroups of the lab's nodes, after their processes have ended. Returns what could not be removed."""
    if lab.proctrack != "cgroup":
        return []
    roots = [path for node in lab.node_names for path in MOUNT.glob(f"*/slurm_{node}")]
    roots += [MOUNT / "system.slice" / f"{node}_slurmstepd.scope" for node in lab.node_names]
    deadline = time.monotonic() + 5
    # A process that was just killed keeps its cgroup busy until its parent has taken note.
    while (left := [root for root in roots if root.exists()]) and time.monotonic() < deadline:
        for root in left:
            for folder, _, _ in os.walk(root, topdown=False):
                try:
                    Path(folder).rmdir()
                except OSError:
                    continue
        time.sleep(0.02)
    return left
