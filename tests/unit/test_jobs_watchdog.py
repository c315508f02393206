"""What the launcher does about a hang: the report, the record, the words on the board, and the end of its workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_dist.config.loader import write_config
from sft_dist.config.schema import Config
from sft_dist.files import read_json
from sft_dist.jobs import watchdog
from sft_dist.jobs.beats import BEATS
from sft_dist.jobs.board import board_of
from sft_dist.jobs.hang import Seen
from sft_dist.jobs.last_words import read_words
from sft_dist.jobs.place import Place
from sft_dist.jobs.watchdog import Watchdog
from sft_dist.rundir import RunDir

Begin = Callable[..., "subprocess.Popen[str]"]

# A worker that has done three steps and then stays where it is.
WORKER = """
import sys, time
from pathlib import Path
from sft_dist.train import heartbeat
heartbeat.begin(int(sys.argv[2]), Path(sys.argv[1]))
for _ in range(3):
    heartbeat.pulse().step_took(0.1)
heartbeat.phase(sys.argv[3], 3)
print("ready", flush=True)
def stays():
    time.sleep(600)
stays()
"""


class Clock:
    """A monotonic clock that goes only when something waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watchdog, "time", made)
    return made


def a_run(folder: Path, timeout: object) -> RunDir:
    run = RunDir(folder / "run")
    run.path.mkdir()
    run.config.write_text(write_config(Config.model_validate({"train": {"hang_timeout": timeout}})))
    return run


@pytest.fixture
def begin() -> Iterator[Begin]:
    started: list[subprocess.Popen[str]] = []

    def start(dog: Watchdog, rank: int, phase: str = "step") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(dog.run.path), str(rank), phase],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **dog.environment(os.environ)},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def look(dog: Watchdog, clock: Clock, seconds: int) -> bool:
    """Look once a second for so long; whether a hang was seen."""
    for _ in range(seconds):
        clock.now += 1.0
        if dog.hung():
            return True
    return False


@pytest.mark.parametrize("timeout", [None, "no config"])
def test_without_a_limit_nothing_is_watched(tmp_path: Path, timeout: str | None, clock: Clock) -> None:
    run = RunDir(tmp_path / "empty") if timeout else a_run(tmp_path, None)
    dog = Watchdog(run, 2)
    assert dog.environment({}) == {}
    assert not look(dog, clock, 5000)
    dog.close()


def test_a_hang_is_written_down_and_the_workers_are_asked_to_end(tmp_path: Path, begin: Begin, clock: Clock) -> None:
    run = a_run(tmp_path, 30)
    dog = Watchdog(run, 2)
    folder = Path(dog.environment({})[BEATS])
    waiting, behind = begin(dog, 0, "optimizer"), begin(dog, 1)
    assert not look(dog, clock, 25)
    assert look(dog, clock, 10)
    status = read_json(run.status)
    assert (status["state"], status["exit_status"]) == ("failed", 1)
    assert status["reason"].startswith(
        f"hang: rank 1 (process {behind.pid} on {dog.node}) is in phase step after step 3 "
    )
    (word,) = read_words(run, 0)
    assert (word.kind, word.rank, word.node, word.message) == ("hang", 1, dog.node, status["reason"])
    (report,) = run.logs.glob("hang-*.txt")
    assert report.name == f"hang-{dog.node}.txt"
    assert report.name in status["reason"]
    text = report.read_text()
    assert text.count("most recent call first") == 2
    assert f"rank 0     {dog.node}  process {waiting.pid}  step 3  phase optimizer" in text
    assert [process.wait(timeout=30) for process in (waiting, behind)] == [-signal.SIGTERM] * 2
    assert not dog.hung(), "once is enough"
    run.write_status(state="failed", reason="rank 1 was killed by SIGKILL")
    dog.close()
    assert read_json(run.status)["reason"] == status["reason"], "the cause stands, not its consequence"
    assert not folder.exists()


def test_nobody_is_asked_to_save_without_one_that_is_stopped(tmp_path: Path, begin: Begin, clock: Clock) -> None:
    dog = Watchdog(a_run(tmp_path, 30), 2)
    waiting, stopped = begin(dog, 0, "optimizer"), begin(dog, 1)
    stopped.send_signal(signal.SIGSTOP)
    while watchdog.state_of(stopped.pid) != "T":
        pass
    assert look(dog, clock, 40)
    assert dog.culprit is not None
    assert (dog.culprit.rank, dog.culprit.state) == (1, "T")
    assert (waiting.poll(), stopped.poll()) == (None, None), "whoever asked kills them"
    dog.close()


def test_a_healthy_run_is_left_alone(tmp_path: Path, begin: Begin, clock: Clock) -> None:
    run = a_run(tmp_path, "auto")
    dog = Watchdog(run, 1)
    worker = begin(dog, 0)
    assert not look(dog, clock, 290)
    assert worker.poll() is None
    dog.close()
    assert not run.status.exists()
    assert not list(run.logs.glob("hang-*"))


def place_of(run: RunDir, task: int, tasks: int = 2, nodes: tuple[str, ...] = ("n1", "n2")) -> Place:
    return Place("7", 0, nodes, task * len(nodes) // tasks, task, tasks, "127.0.0.1", 20000, str(run.path))


def test_the_nodes_put_together_what_they_see(tmp_path: Path, begin: Begin, clock: Clock) -> None:
    """This node's rank only waits; the one that it waits for is on the other node, which answers on the board."""
    run = a_run(tmp_path, 30)
    dog = Watchdog(run, 1, place_of(run, 0))
    begin(dog, 0, "optimizer")
    other = Seen(1, "n2", 4321, 3, "data", 31.0, 30.0, "S", False)
    board_of(place_of(run, 1)).say("hang", ranks=[other.facts()])
    assert look(dog, clock, 40)
    reason = read_json(run.status)["reason"]
    assert reason.startswith(
        "hang: rank 1 (process 4321 on n2) is in phase data after step 3 for 31 s, behind the others"
    )
    assert (run.logs / "hang-n1.txt").is_file()
    mine = [entry for entry in board_of(place_of(run, 0)).said("hang") if entry["task"] == 0]
    assert [facts["rank"] for facts in mine[0]["ranks"]] == [0]
    dog.close()


def test_a_node_that_has_not_noticed_yet_says_what_it_sees_when_another_has(
    tmp_path: Path, begin: Begin, clock: Clock
) -> None:
    run = a_run(tmp_path, 1000)
    dog = Watchdog(run, 1, place_of(run, 1))
    begin(dog, 1)
    assert not look(dog, clock, 30)
    board_of(place_of(run, 0)).say("hang", ranks=[Seen(0, "n1", 1, 4, "data", 1001.0, 1000.0).facts()])
    assert look(dog, clock, 2)
    assert "rank 1 (" in read_json(run.status)["reason"]
    dog.close()


def test_tasks_that_share_a_node_have_a_report_each(tmp_path: Path, begin: Begin, clock: Clock) -> None:
    run = a_run(tmp_path, 30)
    dog = Watchdog(run, 1, place_of(run, 1, tasks=2, nodes=("n1",)))
    begin(dog, 1)
    assert look(dog, clock, 40)
    assert [path.name for path in run.logs.glob("hang-*")] == ["hang-n1.1.txt"]
    dog.close()


def test_processes_that_never_start_end_the_attempt(tmp_path: Path, clock: Clock) -> None:
    run = a_run(tmp_path, "auto")
    dog = Watchdog(run, 4)
    assert look(dog, clock, 1000)
    assert read_json(run.status)["reason"] == "hang: 4 of 4 processes have not started after 900 s"
    dog.close()
