"""What torchrun's agent puts on record about workers that failed, and when it leaves the record alone."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_dist.jobs import elastic
from sft_dist.jobs.launcher import ATTEMPT_HELD
from sft_dist.rundir import RunDir

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
