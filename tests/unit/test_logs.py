"""Where our lines go, and what becomes of them when nobody can read them."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sft_dist.logs import log_to_stderr
from sft_dist.train.progress import Progress


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("sft_dist")
    before, level = list(found.handlers), found.level
    found.handlers.clear()
    log_to_stderr()
    yield found
    found.handlers[:] = before
    found.setLevel(level)


class Full(io.StringIO):
    """The log of a job, on the full disk that its training survives."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_that_nobody_reads_ends_nothing(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sft-dist train ... 2>&1 | tee log` and Ctrl-C, which ends the tee, too: the line "saving a checkpoint" was an error."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8", buffering=1) as stderr:
        os.close(reader)
        monkeypatch.setattr(sys, "stderr", stderr)
        logger.warning("SIGINT at step 3: saving a checkpoint, then stopping")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stderr.fileno())
    monkeypatch.setattr(sys, "stderr", Full())
    logger.warning("step 4")
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    logger.warning("step 5")
    assert said.getvalue() == "step 5\n"


CLOSED = """
import os, pty, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
here, there = pty.openpty()
os.dup2(there, 2)
os.close(there)
os.environ["TERM"] = "xterm"
os.environ.pop("NO_COLOR", None)
from sft_dist.train.progress import Progress
progress = Progress()
progress.begin(0, 9)
assert progress._bar is not None
progress.step(1)
os.close(here)  # the terminal is closed
progress.step(2)
progress.metrics({"step": 2, "loss": 1.0})
progress.end()
print("went on", progress._bar)
"""


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", CLOSED], stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout == "went on None\n"
    assert Progress(silent=True)._bar is None
