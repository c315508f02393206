"""`submit --wait`: it says what happens, ends when nothing more will, and leaves the queue in peace."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from sft_dist import cli_submit
from sft_dist.cli_runs import swept
from sft_dist.errors import ConfigError, RunStopped, SftDistError
from sft_dist.files import append_jsonl
from sft_dist.jobs import queue
from sft_dist.jobs.queue import Job, Queue
from sft_dist.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(cli_submit, "FOLLOW_S", 0.01)
    monkeypatch.setattr(cli_submit, "GONE_S", 0.1)
    monkeypatch.setattr(cli_submit, "QUEUE_EVERY_S", 0.05)
    run = RunDir(tmp_path / "demo")
    run.write_status(state="queued")
    return run


def test_a_local_job_that_ends_without_a_word_ends_the_wait(run: RunDir) -> None:
    """Its set-up lines have failed, say: there is no record."""
    job = subprocess.Popen(["false"])
    with pytest.raises(SftDistError, match="without a word") as caught:
        cli_submit._follow([(run, str(job.pid))], local=True)
    assert f"sft-dist logs {run.path}" in str(caught.value)


def test_a_local_job_at_work_is_waited_for(run: RunDir) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as job:
        assert not cli_submit._none_left([str(job.pid)], local=True)
        job.kill()
    assert cli_submit._none_left([str(job.pid)], local=True)


def test_the_last_words_of_jobs_that_are_gone_are_heard(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> Queue:
        run.write_status(state="stopped", reason="time limit")
        return Queue({"7": Job("7", "FAILED")}, known=True)

    monkeypatch.setattr(queue, "ask_queue", gone)
    with pytest.raises(RunStopped, match="time limit"):
        cli_submit._follow([(run, "7")], local=False)


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_the_word_of_workers_is_not_the_last(run: RunDir, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """They write it before it is decided that the job comes back."""
    run.write_status(state=state, attempt=1)
    looks: list[str] = []

    def rest(_: float) -> None:
        looks.append("")
        if len(looks) == 2:
            append_jsonl(run.attempts, {"attempt": 1})
            run.write_status(state="queued")
        if len(looks) == 4:
            append_jsonl(run.attempts, {"attempt": 2})
            run.write_status(state="done", attempt=2)

    monkeypatch.setattr(time, "sleep", rest)
    monkeypatch.setattr(queue, "ask_queue", lambda _: Queue({"7": Job("7", "RUNNING")}, known=True))
    cli_submit._follow([(run, "7")], local=False)
    assert len(looks) == 4


def test_the_word_of_workers_counts_once_the_job_is_gone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_status(state="stopped", attempt=1, reason="saved")
    monkeypatch.setattr(queue, "ask_queue", lambda _: Queue(known=True))
    with pytest.raises(RunStopped, match="saved"):
        cli_submit._follow([(run, "7")], local=False)


def test_the_queue_is_asked_much_less_often_than_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """For days, by every user: the controller has other work."""
    looks: list[str] = []
    asked: list[int] = []

    def rest(_: float) -> None:
        looks.append("")
        if len(looks) == 30:
            run.write_status(state="done")

    def answer(_: object) -> Queue:
        asked.append(len(looks))
        return Queue({"7": Job("7", "RUNNING")}, known=True)

    monkeypatch.setattr(cli_submit, "QUEUE_EVERY_S", 3600.0)
    monkeypatch.setattr(time, "sleep", rest)
    monkeypatch.setattr(queue, "ask_queue", answer)
    cli_submit._follow([(run, "7")], local=False)
    assert asked == [0]


@pytest.mark.parametrize("answer", [Queue(silent=True), Queue({"7": Job("7", "PENDING")}, known=True)])
def test_a_queue_that_is_silent_ends_nothing(answer: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "ask_queue", lambda _: answer)
    assert not cli_submit._none_left(["7"], local=False)
    monkeypatch.setattr(queue, "ask_queue", lambda _: Queue(known=True))
    assert cli_submit._none_left(["7"], local=False)


def test_an_array_may_sweep_the_seed_and_never_makes_one_run_twice() -> None:
    """With --overwrite two tasks were at work in one folder."""
    made = swept("smoke", [], ["run.seed=1,2"])
    assert [(str(it.config.run.name), it.config.run.seed) for it in made] == [("smoke-seed-1", 1), ("smoke-seed-2", 2)]
    for twice in ("train.learning_rate=1e-5,1e-05", "data.system=a b,a-b"):
        with pytest.raises(ConfigError, match="two runs called smoke-"):
            list(swept("smoke", [], [twice]))
    for kept in ("run.name=a,b", "run.dir=a,b", "slurm.nodes=1,2"):
        with pytest.raises(ConfigError, match="an array has one slurm section"):
            list(swept("smoke", [], [kept]))
