"""Stopping on request: a signal sets a flag, the flag is read between steps, and the trainer saves before it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from sft_dist.errors import RunStopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

# What clusters send ahead of time, and what would end a process that has no handler yet.
EARLY = (signal.SIGUSR1, signal.SIGUSR2)


def hold_early_signals() -> None:
    """Let SIGUSR1 and SIGUSR2 wait until an attempt is there to put the stop on record (StopRequest.release)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, EARLY)


# How long a signal may go unheard while processes meet. They wait in C++, where no handler of Python's runs, and for one that
# a signal has ended they would wait for minutes.
UNHEARD_S = 5.0


@contextlib.contextmanager
def heard_while_waiting(leave: Callable[[int], None]) -> Iterator[None]:
    """Call `leave` with the number of a signal that Python's handlers do not get to while this block waits; in another thread."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] in SIGNALS and not over.wait(UNHEARD_S):
                    leave(number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()


class Interrupted(RunStopped):
    """Stopped outside of the training, where processes do not agree: others may be waiting for this one."""


class StopRequest:
    """Catches the signals that ask for an orderly stop while it is entered as a context.

    Outside of `deferred` there is nothing to save and a signal raises Interrupted where it arrives; inside it is noted.
    A second SIGINT raises KeyboardInterrupt at once: whoever presses Ctrl-C twice does not want to wait for a save. Not so
    where `started` by a process that hears the same signals: it passes them on, so that every one comes twice, and ends
    this process itself if it should not wait. What one of two nested contexts has heard is no news to the outer one.
    """

    def __init__(self, *, started: bool = False) -> None:
        self._started = started
        self.heard: list[int] = []
        """The signals that arrived, in order."""
        self.agreed = False
        """Whether the processes have agreed to stop, because of any one's signal: this one's may still be on its way."""
        self._deferred = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            # nohup has it ignored: the terminal may be closed, and the run goes on.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def release(self) -> None:
        """Let in what arrived while this process started, if the one that started it had its signals held back."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    @property
    def number(self) -> int:
        """The first signal, 0 while nothing was asked."""
        return self.heard[0] if self.heard else 0

    @property
    def reason(self) -> str | None:
        """Name of the first signal, None while nothing was asked."""
        return signal.Signals(self.number).name if self.number else None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside this block a signal waits for the next step boundary."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __exit__(self, *_: object) -> None:
        for outer in {getattr(handler, "__self__", None) for handler in self._previous.values()}:
            if isinstance(outer, StopRequest):
                outer.heard += self.heard
                outer.agreed = outer.agreed or self.agreed
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.heard)
        self.heard.append(number)
        if again and number == signal.SIGINT and not self._started:
            raise KeyboardInterrupt
        # Only the first: a cluster's signal may come twice, or to one process later than to others, and must not interrupt
        # the record of the stop.
        if not self._deferred and not again and not self.agreed:
            raise Interrupted(f"stopped by {self.reason} outside of the training")
