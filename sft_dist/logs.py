"""Where our own log lines go."""

from __future__ import annotations

import contextlib
import logging
import sys


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is at the moment, so that a progress bar can put the lines above itself.

    A line that cannot be written is given up: the terminal may be closed, the disk of a job's log full, and a `tee` behind a
    pipe ends by the same Ctrl-C that the run is about to save for.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(self.format(record) + "\n")


def log_to_stderr() -> None:
    """Plain lines on stderr from this package only: the libraries have handlers of their own."""
    logger = logging.getLogger("sft_dist")
    if not logger.handlers:
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    # Imported by PEFT wherever it is installed, it reports a kernel that only its own CPU speed would need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
