"""Progress on stderr: a bar on a terminal, a plain line a log event elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


class Progress:
    """Shows step, loss, tokens a second and time left of one training; on a terminal that was closed, nothing any more."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        """Show nothing: of several processes only the main one reports."""
        self._bar: Bar | None = None
        self._task: Any = None
        self._first, self._last, self._started = 0, 0, 0.0
        self._shown = ""

    def begin(self, step: int, max_steps: int) -> None:
        """Start at `step` of `max_steps`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._first, self._last, self._started = step, max_steps, time.monotonic()
        if self.silent:
            return
        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal and not os.environ.get("NO_COLOR"):
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[shown]}"), console=console)
            self._task = self._bar.add_task("train", total=max_steps, completed=step, shown="")
            with contextlib.suppress(OSError):
                self._bar.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=step)

    def metrics(self, row: dict[str, Any]) -> None:
        """Show one row of metrics."""
        if self.silent:
            return
        parts = []
        for name, form in (("loss", ".4f"), ("eval_loss", ".4f"), ("learning_rate", ".2e"), ("tokens_per_s", ".0f")):
            if isinstance(row.get(name), (int, float)):
                parts.append(f"{name} {row[name]:{form}}")
        self._shown = "  ".join(parts)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, shown=self._shown)
            return
        done = row["step"] - self._first
        left = (time.monotonic() - self._started) / done * (self._last - row["step"]) if done > 0 else None
        clock = "" if left is None else f"  left {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        log.info("step %d/%d  %s%s", row["step"], self._last, self._shown, clock)

    def end(self) -> None:
        """Take the bar down."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.stop()
