"""What a task does before and after its processes, with stand-ins for these."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from sft_dist.jobs import node
from sft_dist.jobs.board import board_of
from sft_dist.jobs.node import NodeJob
from sft_dist.jobs.place import Place
from sft_dist.rundir import RunDir


@pytest.fixture
def place(tmp_path: Path) -> Place:
    RunDir(tmp_path).write_status(state="running", attempt=1)
    return Place("7", 1, ("n1", "n2"), 1, 1, 2, "n1", 20001, str(tmp_path), 3, f"{tmp_path}/requeue.7.1")


@pytest.mark.parametrize("task", [0, 1])
def test_the_first_task_says_that_it_hears_signals(
    task: int, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From there on the batch script leaves it to the marker whether the job goes back into the queue."""
    heard: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, _: heard.append(number))
    monkeypatch.setattr(node, "find_place", lambda *_: dataclasses.replace(place, task=task))
    for name in ("_lead", "_follow"):
        monkeypatch.setattr(node, name, lambda *_: 0)
    with pytest.raises(SystemExit):
        NodeJob({})()
    assert (tmp_path / "requeue.7.1.begun").exists() == (task == 0)
    assert {signal.SIGTERM, signal.SIGUSR2} <= set(heard)


@pytest.mark.parametrize(
    ("heard", "status", "failed"),
    [
        *[([15], -15, False), ([15], 143, False), ([], -15, True), ([12], -9, True), ([15], 0, False)],
        *[([2], 130, False), ([2], 143, False), ([2], 1, True), ([], 130, True)],
    ],
)
def test_processes_that_the_signal_of_a_preemption_ended_have_not_failed(
    place: Place, monkeypatch: pytest.MonkeyPatch, heard: list[int], status: int, failed: bool
) -> None:
    """torchrun has no handler yet while it loads."""
    follow(place, heard, status, monkeypatch)
    assert RunDir(Path(place.run)).read_status()["state"] == ("failed" if failed else "running")
    assert bool(board_of(place).said("failed")) == failed


@pytest.mark.parametrize("end", ["stopped", "done"])
def test_processes_that_end_badly_after_the_end_have_not_failed_the_run(
    end: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task 0 hears of it, since its agent waits for the one here, but the record stays."""
    run = RunDir(Path(place.run))
    if end == "stopped":
        run.write_status(state="stopped", reason="stopped by SIGUSR2 at step 8", exit_status=0)
    else:
        run.model.mkdir()
        (run.model / "DONE").touch()
    before = run.read_status()
    follow(place, [12], 1, monkeypatch)
    assert run.read_status() == before
    assert board_of(place).said("failed")


def follow(place: Place, heard: list[int], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the second task, with processes that end with this status."""
    first = board_of(dataclasses.replace(place, task=0))
    first.say("train", processes=1)

    def share(*_: Any) -> int:
        return status

    def rest(_: float) -> None:
        first.say("end")

    monkeypatch.setattr(node, "run_share", share)
    monkeypatch.setattr(node.time, "sleep", rest)
    assert node._follow(place, heard) == 0
