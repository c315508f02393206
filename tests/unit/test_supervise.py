"""The process of a job's first task, as far as it goes without torch."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest

from sft_dist import supervise
from sft_dist.jobs.place import Place
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


@pytest.mark.parametrize("restart", [0, 1])
def test_a_job_that_was_requeued_waits_until_its_start_before_lets_go(
    restart: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM brings a job back when a node does not answer it, whatever still runs there."""
    run = RunDir(tmp_path)
    place = Place("7", restart, ("n1",), 0, 0, 1, "n1", 20001, str(tmp_path), 10, f"{tmp_path}/m")
    monkeypatch.setenv("SFT_DIST_PLACE", place.to_text())
    begun: list[tuple[Place | None, bool]] = []
    monkeypatch.setattr(supervise, "run_here", lambda run, place: begun.append((place, run.held())))
    looks = 0
    with contextlib.ExitStack() as before:
        before.enter_context(run.locked())

        def sleep(_: float) -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                before.close()

        monkeypatch.setattr(supervise.time, "sleep", sleep)
        assert supervise.main([str(tmp_path)]) == 0
    assert (begun, looks) == ([(place, restart == 0)], 3 * restart)
    monkeypatch.setattr(supervise, "HELD_S", 0.0)
    with run.locked():
        supervise._wait_for_the_start_before(run, dataclasses.replace(place, restart=1))
