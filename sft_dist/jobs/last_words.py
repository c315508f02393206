"""What a process that fails leaves for whoever keeps the record: one small file in logs/failed/ of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_dist.errors import RunStopped, SftDistError, WorkersFailed, exit_status, stop_behind
from sft_dist.files import read_json, write_json
from sft_dist.jobs.host_signs import kernel_lines, now
from sft_dist.jobs.place import handed_place
from sft_dist.jobs.words import Word
from sft_dist.rundir import RunDir

MAX_MESSAGE = 4000
MAX_CHAIN = 4
# The driver's line about a GPU comes at most so long before the error that a process sees.
KERNEL_S = 120.0


@contextlib.contextmanager
def leaving_words(run: RunDir | None, rank: int | None = None) -> Iterator[None]:
    """An error that leaves the block is put down for `run` as the word of this rank; None: nothing is. It passes unchanged.

    Only a stop that a library has made an error of its own leaves as the stop: modules are loaded for seconds, and a
    signal amid that comes back as "Failed to import ...".
    """
    try:
        yield
    except (RunStopped, KeyboardInterrupt, GeneratorExit, SystemExit):
        raise
    except BaseException as error:
        stopped = stop_behind(error)
        if stopped is not None:
            raise stopped from None
        if run is not None:
            leave_words(run, error, rank)
        raise


def leave_words(run: RunDir, error: BaseException, rank: int | None = None) -> None:
    """Put `error` down as the word of this rank; the first one stays. Never raises: the disk may be what failed."""
    with contextlib.suppress(Exception):
        _write(run, word_of(error, rank), f"{'main' if rank is None else rank}.json")


def leave_ending(run: RunDir, rank: int | None, pid: int, number: int, *, oom_kills: int = 0) -> None:
    """Put down that the signal `number` ended a process that this one started. Never raises."""
    with contextlib.suppress(Exception):
        lines = kernel_lines(now() - KERNEL_S)
        word = Word(signal=number, pid=pid or None, oom_kills=oom_kills, kernel=lines, **_here(rank))
        _write(run, word, f"{'main' if rank is None else rank}-ended.json")


def leave_kind(run: RunDir, kind: str, message: str, rank: int | None = None, node: str | None = None) -> None:
    """Put down a failure that somebody watching has seen, with its class (signs.KINDS). Never raises."""
    with contextlib.suppress(Exception):
        here = _here(rank)
        here["node"] = node or here["node"]
        _write(run, Word(kind=kind, message=message[:MAX_MESSAGE], **here), f"{kind}.json")


def word_of(error: BaseException, rank: int | None = None) -> Word:
    """What is worth keeping of `error` and of those that it was raised from."""
    chain: list[BaseException] = []
    current = error
    while (before := current.__cause__ or current.__context__) is not None and len(chain) < MAX_CHAIN:
        chain.append(before)
        current = before
    kind = getattr(error, "kind", None)
    return Word(
        type=_name(error),
        message=_message(error),
        errno=_errno(error),
        kind=kind if isinstance(kind, str) else None,
        chain=tuple((_name(it), _message(it), _errno(it)) for it in chain),
        echo=isinstance(error, WorkersFailed) or type(error).__name__ == "MainFailed",
        exit=exit_status(error),
        pid=os.getpid(),
        kernel=kernel_lines(now() - KERNEL_S),
        **_here(rank),
    )


def read_words(run: RunDir, attempt: int) -> list[Word]:
    """The words of one attempt; a file that cannot be read is left out."""
    found = []
    for path in sorted((run.logs / "failed").glob(f"{attempt}-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            content = read_json(path)
            content["chain"] = tuple((str(a), str(b), c) for a, b, c in content.get("chain", ()))
            content["kernel"] = tuple(content.get("kernel", ()))
            found.append(Word(**content))
    return found


def _write(run: RunDir, word: Word, name: str) -> None:
    attempt = run.read_status().get("attempt") or 0
    path = run.logs / "failed" / f"{attempt}-{name}"
    if not path.exists():
        write_json(path, dataclasses.asdict(word))


def _here(rank: int | None) -> dict[str, Any]:
    place = handed_place()
    node = socket.gethostname() if place is None else place.nodes[place.node]
    return {"rank": rank, "node": node, "time": time.time()}


def _name(error: BaseException) -> str:
    if isinstance(error, SftDistError):  # its message needs no type to be understood
        return ""
    kind = type(error)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    """Without the stack of C++ that torch appends, which may name any function."""
    text = getattr(error, "message", None)
    text = text if isinstance(text, str) else str(error)
    return text.split("\nException raised from ")[0][:MAX_MESSAGE]


def _errno(error: BaseException) -> int | None:
    number = error.errno if isinstance(error, OSError) else None
    return number if isinstance(number, int) else None


def held_run(variable: str) -> RunDir | None:
    """The run whose directory the environment names, for workers whose launcher keeps the record."""
    path = os.environ.get(variable)
    return RunDir(Path(path)) if path else None
