"""The exceptions that users may see; each carries the exit code of the command that it ends.

    SftDistError              1   the run failed
    ├── ConfigError           2   the config or the command line is wrong; holds every problem found
    ├── PreflightError        3   the run would not start here
    ├── DataError             4   a data file or row cannot be used
    ├── CheckpointError       5   a checkpoint or an export is missing or damaged
    │   └── DiskError         5   a checkpoint cannot be written: no room, no permission, a broken disk
    ├── NumbersError          1   the loss or a gradient is not finite
    ├── RunStopped           75   stopped early, resumable
    └── WorkersFailed        its  another process failed, and says why itself

The library raises; only `sft_dist.cli` turns an exception into an exit status.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class SftDistError(Exception):
    """A failure that a user can act on.

    `message` says what was set and why it fails; `hint` is what to do or type next.
    """

    exit_code = 1
    kind: str | None = None
    """The class of the failure, where the error tells it: one of those in docs/failures.md."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class ConfigError(SftDistError):
    """One or more wrong values in a config; `problems` holds a line for each, with its dotted path."""

    exit_code = 2
    kind = "config"

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__("\n  ".join([message, *problems]), hint=hint)
        self.problems = tuple(problems)


class PreflightError(SftDistError):
    """Something that the run needs (a package, a model, the network, a device) is missing here."""

    exit_code = 3
    kind = "config"


class DataError(SftDistError):
    """A data source, or a row in it, cannot be used; the message names file and line."""

    exit_code = 4
    kind = "data"
    reason: str = "wrong_format"
    """Of a row that cannot be used: the class of what is wrong with it, by which dropped rows are counted."""


class CheckpointError(SftDistError):
    """A checkpoint or an export is missing, incomplete or damaged."""

    exit_code = 5
    kind = "checkpoint"


class DiskError(CheckpointError):
    """A checkpoint could not be written, or would not fit; the ones before it stay."""

    kind = "disk"


class NumbersError(SftDistError):
    """The loss or a gradient is not finite."""

    kind = "numbers"


class RunStopped(SftDistError):
    """The run was asked to stop and did, with a checkpoint to resume from."""

    exit_code = 75


class WorkersFailed(SftDistError):
    """The failure of another process; the message is what it left."""


class SaidBefore(WorkersFailed):
    """The failure of another process, which has explained it on stderr already."""


def failure(message: str, exit_code: int) -> SftDistError:
    """The failure of another process, with the exit status that it ended with.

    With another status than 1 it ended with one of the errors above, and has said so.
    """
    error = WorkersFailed(message) if exit_code == 1 else SaidBefore(message)
    error.exit_code = exit_code
    return error


def stop_behind(error: BaseException) -> RunStopped | None:
    """The stop that `error` is, or that it was raised from; None if there is none."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None or isinstance(seen, RunStopped):
            return seen
        seen = seen.__cause__
    return None


def exit_status(error: BaseException) -> int:
    """The exit status of a process that ends with `error`."""
    return error.exit_code if isinstance(error, SftDistError) else 1


def explained(error: SftDistError | OSError) -> str:
    """What went wrong and what to do, as lines for the terminal."""
    if isinstance(error, SaidBefore):
        return ""
    if isinstance(error, SftDistError):
        return f"{error}\n" if isinstance(error, RunStopped) else f"error: {error}\n"
    where = f"{error.filename}: " if error.filename else ""
    hint = (
        "free some space, or put runs and cache elsewhere: run.dir=..., SFT_DIST_CACHE=..."
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "check the path and its permissions; add --debug for where it happened"
    )
    return f"error: {where}{error.strerror or error}\n  {hint}\n"
