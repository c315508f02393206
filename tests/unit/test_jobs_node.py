"""What a task does before and after its processes, with stand-ins for these."""

from __future__ import annotations

import dataclasses
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import append_jsonl
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
    begun = tmp_path / "requeue.7.1.begun"
    assert begun.exists() == (task == 0)
    assert task != 0 or begun.read_text() == f"{place.run}\n"
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


def test_a_run_begins_anew_in_its_job(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks, each in a thread as on a node of its own: again, again, and then back into the queue."""
    decided = iter(["again in this job: unknown", "again in this job: hang", "requeue 3 of 3: unknown"])
    attempts: list[tuple[int, Place]] = []

    def supervised(here: Place, heard: list[int]) -> tuple[int, str]:
        board_of(here).say("train", processes=1)
        while not [entry for entry in attempts if entry[1].key == here.key and entry[0] == 1]:
            time.sleep(0.01)
        word = next(decided)
        append_jsonl(RunDir(tmp_path).attempts, {"job_id": "7", "decided": word})
        attempts.append((0, here))
        return 1, word

    def share(run: RunDir, _: Any, heard: list[int], here: Place) -> int:
        attempts.append((1, here))
        return 1

    monkeypatch.setattr(node, "_supervised", supervised)
    monkeypatch.setattr(node, "run_share", share)
    monkeypatch.setenv("SFT_DIST_PLACE", place.to_text())
    (tmp_path / "config.yaml").write_text("{}\n")
    first = dataclasses.replace(place, task=0, node=0)
    with ThreadPoolExecutor(2) as pool:
        lead, follow = pool.submit(node._lead, first, []), pool.submit(node._follow, place, [])
        assert (lead.result(60), follow.result(60)) == (0, 0)
    assert Path(place.marker).is_file(), "the last word is the queue"
    assert Path(f"{place.marker}.begun").read_text() == "\n", "the batch script need not decide"
    assert [[here.again for task, here in attempts if task == it] for it in (0, 1)] == [[0, 1, 2], [0, 1, 2]]
    ports = {(here.again, here.port) for _, here in attempts}
    assert len(ports) == len({port for _, port in ports}) == 3, "all tasks meet at the same new port each time"


def test_a_job_of_which_a_task_is_gone_goes_back_into_the_queue(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supervised(*_: Any) -> tuple[int, str]:
        append_jsonl(RunDir(tmp_path).attempts, {"job_id": "7", "decided": "again in this job: network"})
        return 1, "again in this job: network"

    monkeypatch.setattr(node, "_supervised", supervised)
    monkeypatch.setattr(node, "LEAVE_S", 0.0)
    monkeypatch.setenv("SFT_DIST_PLACE", place.to_text())
    (tmp_path / "config.yaml").write_text("{}\n")
    assert node._lead(dataclasses.replace(place, task=0, node=0), []) == 0
    assert Path(place.marker).is_file()
    assert board_of(place.anew()).said("end"), "one that comes late ends, too"
