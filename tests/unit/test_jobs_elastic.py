"""What torchrun's agent puts on record about workers that failed, and when it leaves the record alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_dist.jobs import elastic
from sft_dist.jobs.launcher import ATTEMPT_HELD
from sft_dist.rundir import RunDir

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
STOPPED = {"state": "stopped", "reason": "stopped by SIGUSR2 at step 8", "exit_status": 0}
EARLY = {**STOPPED, "exit_status": 75}


@pytest.mark.parametrize(
    ("before", "done", "code", "state"),
    [
        ({"state": "running"}, False, -signal.SIGABRT, "failed"),
        ({"state": "running"}, False, -signal.SIGTERM, "running"),
        (STOPPED, False, -signal.SIGABRT, "stopped"),
        (STOPPED, False, -signal.SIGKILL, "stopped"),
        (STOPPED, False, 1, "stopped"),
        ({"state": "running"}, True, -signal.SIGABRT, "running"),
        (EARLY, False, 1, "failed"),
        (EARLY, False, 75, "stopped"),
        (EARLY, False, -signal.SIGKILL, "failed"),
    ],
)
def test_how_a_worker_leaves_after_the_end_changes_nothing(
    before: Mapping[str, Any],
    done: bool,
    code: int,
    state: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All have saved and stop, or the model is complete. Who left alone, before that, may have been ended by a failure."""
    run = RunDir(tmp_path)
    run.write_status(attempt=1, **before)
    if done:
        run.model.mkdir()
        (run.model / "DONE").touch()
    monkeypatch.setenv(ATTEMPT_HELD, str(tmp_path))
    error: Any = SimpleNamespace(failures={3: SimpleNamespace(exitcode=code, pid=7)})
    elastic._put_down(error, 0)
    status = run.read_status()
    assert status["state"] == state
    assert (run.logs / "failed").exists() == (state == "failed" and code < 0)
    if state != "failed":
        assert {**before, "attempt": 1} == {name: value for name, value in status.items() if name != "updated"}
        assert ("rank 3 (process 7) was killed by" in capsys.readouterr().err) == (code in (-6, -9))


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """This process as the agent of launcher 7; the list holds the number of its parent."""
    before = {number: signal.getsignal(number) for number in (TERM, INT, HUP)}
    parent = [7]
    monkeypatch.setenv(ATTEMPT_HELD, str(tmp_path))
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "")
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(elastic, "_until_the_end", stack)
        elastic._leave_signals_to("7")
        yield parent
    for number, handler in before.items():
        signal.signal(number, handler)


def hear(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_the_agent_ends_once_when_its_launcher_is_gone_and_holds_the_run_until_then(
    agent: list[int], tmp_path: Path
) -> None:
    """A second signal would end its wait, and with it the workers that save; a resume would train beside them."""
    run = RunDir(tmp_path)
    with run.locked():
        run.lock.write_text(f"process 7 on {socket.gethostname()}\n", encoding="utf-8")
        hear(TERM, INT, HUP)
    assert not run.held()
    agent[0] = 1
    with pytest.raises(SystemExit) as left:
        hear(TERM)
    assert left.value.code == 128 + TERM
    hear(TERM, HUP, INT)
    assert run.held()
    assert run.lock.read_text(encoding="utf-8").split()[1] == str(os.getpid())
    elastic._until_the_end.close()
    assert not run.held()


@pytest.mark.parametrize("holder", [f"process 8 on {socket.gethostname()}\n", "process 7 on elsewhere\n", ""])
def test_what_the_launcher_did_not_hold_the_agent_leaves_alone(agent: list[int], tmp_path: Path, holder: str) -> None:
    run = RunDir(tmp_path)
    run.lock.write_text(holder, encoding="utf-8")
    agent[0] = 1
    with pytest.raises(SystemExit):
        hear(HUP)
    assert not run.held()
    assert run.lock.read_text(encoding="utf-8") == holder


def test_without_a_launcher_torchrun_hears_signals_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (TERM, INT, HUP)}
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE", raising=False)
    elastic._leave_signals_to(None)
    assert {number: signal.getsignal(number) for number in before} == before
    assert "PET_SIGNALS_TO_HANDLE" not in os.environ
