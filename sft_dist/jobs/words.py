"""What is known of how an attempt ended: what its processes left, and what others say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Word:
    """What one process left: the error that ended it, or, from the one that started it, the signal that did."""

    type: str = ""
    message: str = ""
    errno: int | None = None
    kind: str | None = None
    """The class, where the error says it itself."""
    chain: tuple[tuple[str, str, int | None], ...] = ()
    """Type, message and errno of the errors that this one was raised from, nearest first."""
    echo: bool = False
    """It only says that another process failed."""
    signal: int = 0
    exit: int = 1
    rank: int | None = None
    pid: int | None = None
    node: str | None = None
    time: float = 0.0
    oom_kills: int = 0
    """Processes that the kernel killed for memory in the cgroup of this process, since it started."""
    kernel: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobWord:
    """What SLURM says about the job."""

    state: str = ""
    """NODE_FAIL, OUT_OF_MEMORY, PREEMPTED, ...; RUNNING while it does."""
    reason: str = ""
    exit_code: str = ""
    by: str = ""
    """Whose uid cancelled it."""
    down: tuple[str, ...] = ()
    """Nodes of the job that are down."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of how an attempt ended."""

    words: Sequence[Word] = ()
    logs: Mapping[str, str] = field(default_factory=dict)
    """The new text of each log file."""
    job: JobWord | None = None
    oom_kills: int = 0
    kernel: Sequence[str] = ()
    no_inodes: bool = False
    """The run's file system has no room for another file."""
    nodes: Sequence[str] = ()
    """Of the job; a log line that names one of them says where."""
    state: str = "failed"
    reason: str = ""
    """As status.json has them."""
    number: int = 0
    """The first signal that asked for a stop."""
    in_job: bool = False
    cancelled: bool = False
