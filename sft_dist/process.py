"""What our processes have in common: how they start, so that they start fast, and how they end."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterable

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


def status_of(work: Callable[[], object]) -> int:
    """Do `work`; the exit status of a process that does nothing else. Expected errors are explained on stderr."""
    try:
        work()
    except (SftDistError, OSError) as error:
        sys.stderr.write(explained(error))
        return exit_status(error)
    return 0
