"""What our processes have in common: how they start, so that they start fast, and how they end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from sft_dist.errors import SftDistError, exit_status, explained

# More objects than torch, transformers and TRL make while they are imported (1.0 million, versions in docs/decisions.md).
UNTIL_IMPORTED = 2_000_000
# Python's own thresholds, in a process that has begun here.
_usual: list[tuple[int, int, int]] = []


def begin() -> None:
    """Call first where a process of ours starts, never where others import us: it changes how Python works.

    Python's cycle collector walks through what libraries make while they are imported, again and again, and once more
    when the process ends, although all of it stays until then. It looks rarely until `libraries_are_in`, and not at all
    at the end.
    """
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(UNTIL_IMPORTED)
        atexit.register(gc.freeze)


def libraries_are_in() -> None:
    """Collect as usual from here on, but never look at what is there by now; call it before there is a model.

    Does nothing in a process that did not `begin` here, nor the second time.
    """
    if _usual and gc.get_threshold()[0] == UNTIL_IMPORTED:
        gc.freeze()
        gc.set_threshold(*_usual[0])


def leave_out(packages: Iterable[str]) -> None:
    """From here on these packages are as if they were not installed; call it before any library that looks for them.

    Libraries import optional packages wherever they are installed. None in sys.modules is Python's own word for "not
    there" (The import system, 5.3.1). Does nothing in a process that did not `begin` here: others may need them later.
    """
    if _usual:
        for package in packages:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def run_to_end(work: Callable[[], int]) -> NoReturn:
    """Do `work` and exit with the status that it returns, 1 if it raises; the interpreter itself is not taken down.

    For processes that have joined others. A thread of gloo lets go of the last message when it comes to it, which takes
    the interpreter: on a busy machine that was gone by then, and a process that had done all that it was there for ended by
    SIGABRT. The process groups would have to go before, and every trainer holds on to them (pytorch/pytorch#179291, given
    up; #190489). Threads that are not daemons are waited for and exit handlers called as always.
    """
    status = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none, nobody who reads it, closed
                stream.flush()
        ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
        os._exit(status)

    atexit.register(leave)  # called after those that come later
    try:
        status = work()
    except KeyboardInterrupt:
        atexit.unregister(leave)  # Python ends with the signal, which says more than a status
        raise
    sys.exit(status)


def status_of(work: Callable[[], object]) -> int:
    """Do `work`; the exit status of a process that does nothing else. Expected errors are explained on stderr."""
    try:
        work()
    except (SftDistError, OSError) as error:
        sys.stderr.write(explained(error))
        return exit_status(error)
    return 0


@contextlib.contextmanager
def apart(log: Path) -> Iterator[None]:
    """What is started meanwhile is out of reach of Ctrl-C, and says what it says in `log`.

    It inherits that. With this process's own stdout, `$(sft-dist submit ...)` and a pipe would wait for its end.
    """
    kept = [os.dup(number) for number in range(3)]
    with log.open("ab") as out, Path(os.devnull).open("rb") as nothing:
        for number, stream in enumerate((nothing, out, out)):
            os.dup2(stream.fileno(), number)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
