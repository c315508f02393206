"""One attempt at a run: from start to done, stopped or failed, on record in status.json and attempts.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from sft_dist.errors import RunStopped, SftDistError, exit_status
from sft_dist.files import append_jsonl, read_jsonl, utc_now
from sft_dist.rundir import RunDir
from sft_dist.train.ranks import MainFailed
from sft_dist.train.shutdown import Interrupted, StopRequest

# What workers leave in status.json for the launcher that keeps the record.
OUTCOME = ("exit_status", "first_step", "last_step", "accepted_change", "energy_kwh")
TWICE = "interrupted twice, without a save"


class Settle(Protocol):
    """What decides what follows from the end of an attempt."""

    def begin(self) -> None:
        """The run is locked, and the attempt is about to go on record."""

    def __call__(
        self, state: str, reason: str | None, number: int, complete: bool, /
    ) -> tuple[str, str | None, dict[str, Any]]:
        """From the state and its reason, the first signal (0: none) and whether nothing of the run is left: the state
        and reason that status.json gets, and what is added to the line in attempts.jsonl."""
        ...


@dataclass
class Attempt:
    """The attempt that is under way."""

    stop: StopRequest
    facts: dict[str, Any] = field(default_factory=dict)
    """What the training adds to the line in attempts.jsonl: first_step, last_step, accepted_change."""
    complete: bool = True
    """Whether nothing of the run is left to do once this has ended well; a chain of jobs does a part in each."""


@contextlib.contextmanager
def attempt(run: RunDir, settle: Settle | None = None, *, started: bool = False) -> Iterator[Attempt]:
    """Enter an attempt: signals are caught, the state is `running`; when the block ends, how it ended is written.

    `settle` decides what follows from the end, and adds to the record. `started`: see StopRequest.

    A second process that enters the same run is refused (ConfigError). A requested stop leaves as RunStopped, whatever
    stage it interrupted; other exceptions pass unchanged.
    """
    with run.locked():
        yield from _attempt(run, settle, started=started)


@contextlib.contextmanager
def joined(run: RunDir, *, reports: bool) -> Iterator[Attempt]:
    """Enter an attempt that another process keeps the record of: a launcher, or the main one of several workers.

    Signals are caught; with `reports` how the block ended is left in status.json for the one that keeps the record.
    """
    with StopRequest(started=True) as stop:
        current = Attempt(stop)
        outcome: dict[str, Any] = {"state": "running", "reason": None, "exit_status": 0}
        agreed = False
        try:
            yield current
        except RunStopped as error:
            outcome |= {"state": "stopped", "reason": error.message}
            agreed = reports and not isinstance(error, Interrupted)
            # The others, which did not agree, only miss this one: that is not why the attempt ends.
            if isinstance(error, Interrupted):
                reports, outcome["exit_status"] = True, error.exit_code
            raise
        except KeyboardInterrupt:
            outcome |= {"state": "stopped", "reason": TWICE, "exit_status": RunStopped.exit_code}
            reports = True
            raise Interrupted(TWICE) from None
        except MainFailed:
            raise
        except BaseException as error:
            outcome |= {"state": "failed", "reason": _one_line(error), "exit_status": exit_status(error)}
            raise
        finally:
            # The first word is the cause: the others follow when they miss their peer, or when torchrun ends them. That all
            # have agreed to stop is on record already (RunRecorder.on_train_end), but not what the training adds.
            said = run.read_status().get("state")
            first = said not in ("failed", "stopped") and (reports or outcome["state"] == "failed")
            if first or (agreed and said == "stopped"):
                with contextlib.suppress(OSError):
                    run.write_status(**outcome, **current.facts)


def _attempt(run: RunDir, settle: Settle | None, *, started: bool) -> Iterator[Attempt]:
    if settle is not None:
        settle.begin()
    number = len(read_jsonl(run.attempts)) + 1
    start = {"attempt": number, "start": utc_now(), "host": socket.gethostname(), "pid": os.getpid()}
    stale: dict[str, Any] = dict.fromkeys(set(OUTCOME) & run.read_status().keys())
    run.write_status(state="running", reason=None, attempt=number, started=start["start"], **stale)
    state, reason = "failed", None  # until something else is certain
    with StopRequest(started=started) as stop:
        current = Attempt(stop)
        try:
            stop.release()
            yield current
            state = "done"
        except (RunStopped, KeyboardInterrupt) as error:
            stopped = error if isinstance(error, RunStopped) else Interrupted(TWICE)
            stopped.hint = stopped.hint or f"go on with: sft-dist resume {run.quoted}"
            state, reason = "stopped", stopped.message
            raise stopped from None
        except BaseException as error:
            said = run.read_status()  # another worker may have failed first, or have left because it was told to
            told = said.get("state") in ("failed", "stopped")
            state, reason = (said["state"], said["reason"]) if told else ("failed", _one_line(error))
            raise
        finally:
            line = {**start, "end": utc_now(), **current.facts, "ended": state, "reason": reason}
            if settle is not None:
                # Finding out why may take seconds, and a second Ctrl-C ends that; but not the record.
                with contextlib.suppress(KeyboardInterrupt):
                    state, reason, facts = settle(state, reason, stop.number, current.complete)
                    line |= facts
            # On a full disk the record cannot be written either; the failure itself is what the user must see.
            with contextlib.suppress(OSError) if state == "failed" else contextlib.nullcontext():
                _put_down(run, state, reason, line)


def _put_down(run: RunDir, state: str, reason: str | None, line: dict[str, Any]) -> None:
    """The end of an attempt in attempts.jsonl and status.json; where there is no room for a new file, in the old one."""
    try:
        append_jsonl(run.attempts, line)
    finally:
        try:
            run.write_status(state=state, reason=reason)
        except OSError:
            text = json.dumps({**run.read_status(), "state": state, "reason": reason, "updated": utc_now()}, indent=2)
            with run.status.open("r+", encoding="utf-8") as stream:
                stream.write(text + "\n")
                stream.truncate()


def _one_line(error: BaseException) -> str:
    text = error.message if isinstance(error, SftDistError) else f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
