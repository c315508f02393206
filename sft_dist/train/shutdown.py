"""Stopping on request: a signal sets a flag, the flag is read between steps, and the trainer saves before it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from sft_dist.errors import RunStopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Catches the signals that ask for an orderly stop while it is entered as a context.

    Outside of `deferred` there is nothing to save and a signal raises RunStopped where it arrives; inside it is noted
    in `reason`. A second SIGINT raises KeyboardInterrupt at once: whoever presses Ctrl-C twice does not want to
    wait for a save.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the first signal, None while nothing was asked."""
        self._deferred = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside this block a signal waits for the next step boundary."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
        if not self._deferred:
            raise RunStopped(f"stopped by {self.reason} outside of the training")
