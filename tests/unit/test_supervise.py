"""The process of a job's first task, as far as it goes without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist import supervise
from sft_dist.rundir import RunDir


def test_a_run_that_was_cancelled_while_it_waited_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "run_here", lambda *_: pytest.fail("it was started"))
    run = RunDir(tmp_path)
    run.write_status(state="queued")
    run.cancelled.touch()
    assert supervise.main([str(tmp_path)]) == 0
    assert run.read_status()["state"] == "stopped"
    assert f"sft-dist submit {tmp_path}" in capsys.readouterr().err


def test_it_takes_one_run() -> None:
    assert supervise.main([]) == 2
