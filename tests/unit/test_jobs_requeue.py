"""What follows when an attempt in a job has ended."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from sft_dist.jobs.board import Board
from sft_dist.jobs.place import Place
from sft_dist.jobs.requeue import judge
from sft_dist.rundir import RunDir

TERM, USR2 = signal.SIGTERM, signal.SIGUSR2


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("41", 0, ("n1",), 0, 0, 1, "n1", 20001, str(tmp_path), requeues=2, marker=str(tmp_path / "m"))


@pytest.mark.parametrize(("number", "why"), [(TERM, "preemption"), (USR2, "time limit")])
def test_what_the_cluster_stops_goes_back_into_the_queue(place: Place, number: int, why: str) -> None:
    verdict = judge(RunDir(Path(place.run)), place, "stopped", "stopped at step 3", number, complete=True)
    assert verdict.requeue
    assert verdict.state == "queued"
    assert verdict.decided == f"requeue 1 of 2: {why}"


def test_not_more_often_than_asked_for(place: Place) -> None:
    run = RunDir(Path(place.run))
    assert judge(run, dataclasses.replace(place, restart=1), "stopped", "", TERM, complete=True).requeue
    last = judge(run, dataclasses.replace(place, restart=2), "stopped", "", TERM, complete=True)
    assert (last.requeue, last.state) == (False, "stopped")
    never = judge(run, dataclasses.replace(place, requeues=0), "stopped", "", TERM, complete=True)
    assert (never.requeue, never.state) == (False, "stopped")


def test_a_cancelled_run_stays_stopped(place: Place) -> None:
    run = RunDir(Path(place.run))
    run.cancelled.touch()
    verdict = judge(run, place, "stopped", "stopped at step 3", TERM, complete=True)
    assert (verdict.requeue, verdict.state) == (False, "stopped")


@pytest.mark.parametrize("number", [0, TERM])
def test_a_failure_is_over(place: Place, number: int) -> None:
    verdict = judge(RunDir(Path(place.run)), place, "failed", "wrong", number, complete=True)
    assert (verdict.requeue, verdict.state, verdict.reason) == (False, "failed", "wrong")


def test_ctrl_c_is_a_persons_stop(place: Place) -> None:
    assert judge(RunDir(Path(place.run)), place, "stopped", "", signal.SIGINT, complete=True).state == "stopped"


def test_a_link_of_a_chain_leaves_the_run_to_the_next(place: Place) -> None:
    run = RunDir(Path(place.run))
    assert judge(run, place, "done", None, 0, complete=False).state == "queued"
    assert judge(run, place, "done", None, 0, complete=True).state == "done"


def test_the_board_keeps_starts_apart_and_survives_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "slurm" / "board.jsonl"
    Board(path, "41.0", 0).say("end")
    now = Board(path, "41.1", 0)
    assert now.said("end") == []
    now.say("train", processes=2)
    with path.open("a") as stream:
        stream.write('{"key": "41.1", "wo')
    assert [line["processes"] for line in Board(path, "41.1", 3).said("train")] == [2]
    assert Board(tmp_path / "nowhere", "1", 0).said("end") == []
