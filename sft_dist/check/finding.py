"""What an examination has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """What it belongs to: packages, GPUs, processes, host, folders, compiler, network, SLURM, containers."""
    level: Level
    """`note`: some runs will miss it, or run slower; `problem`: training on this machine fails."""
    said: str
    fix: str | None = None
    """What to do about it."""
