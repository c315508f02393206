"""Signals that come twice, late, or to one of several processes only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sft_dist.errors import RunStopped
from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.train.attempt import TWICE, attempt, joined
from sft_dist.train.shutdown import Interrupted, StopRequest

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_signal_that_comes_after_the_agreement_changes_nothing() -> None:
    """Another process's signal was first; this one's own is still on its way while it saves and leaves."""
    with StopRequest() as stop:
        stop.agreed = True
        send(TERM, TERM)
        assert stop.heard == [TERM, TERM]


def test_a_terminal_that_is_closed_asks_for_a_stop_unless_nohup_has_it_ignored() -> None:
    before = signal.signal(HUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with StopRequest() as stop, stop.deferred():
            send(HUP)
            assert (stop.heard, stop.reason) == ([HUP], "SIGHUP")
        assert signal.getsignal(HUP) == signal.SIG_DFL
        signal.signal(HUP, signal.SIG_IGN)
        with StopRequest() as stop:
            send(HUP)
            assert stop.heard == []
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_what_the_inner_context_has_heard_is_no_news_to_the_outer_one() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner, inner.deferred():
            send(TERM)
        send(TERM)
        assert outer.heard == [TERM, TERM]
        with StopRequest() as another:
            another.agreed = True
        assert outer.agreed


def test_a_first_interrupt_after_the_agreement_is_not_a_second_one() -> None:
    with StopRequest() as stop:
        stop.agreed = True
        send(INT)
        with pytest.raises(KeyboardInterrupt):
            send(INT)


def test_two_interrupts_of_a_worker_are_one_that_came_twice(tmp_path: Path) -> None:
    """Once by itself, once passed on by the launcher, which ends its workers if they are not to save."""
    run = RunDir(tmp_path / "run")
    run.write_status(state="running")
    with joined(run, reports=False) as current, current.stop.deferred():
        send(INT, INT)
        assert current.stop.heard == [INT, INT]
    assert run.read_status()["state"] == "running"


@pytest.mark.parametrize("started", [False, True], ids=["by a person", "by a job"])
def test_two_interrupts_leave_at_once_where_a_person_has_started_it(started: bool, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(RunStopped) as left, attempt(run, started=started) as current, current.stop.deferred():
        send(INT, INT)
        raise RunStopped("stopped by SIGINT at step 3")
    assert str(left.value.message) == ("stopped by SIGINT at step 3" if started else TWICE)


def test_a_worker_that_only_missed_the_one_that_was_told_does_not_fail_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.write_status(state="running")
    with pytest.raises(Interrupted), joined(run, reports=False):
        send(TERM)
    with pytest.raises(RuntimeError), joined(run, reports=True):
        raise RuntimeError("Connection closed by peer")
    assert run.read_status()["state"] == "stopped"
    assert "SIGTERM" in run.read_status()["reason"]


def test_an_agreed_stop_that_is_on_record_stays_and_gets_the_facts(tmp_path: Path) -> None:
    """The training puts it down before any process leaves (train/callbacks.py)."""
    run = RunDir(tmp_path / "run")
    stopped = {"state": "stopped", "reason": "stopped by SIGUSR2 at step 8", "exit_status": 0}
    run.write_status(**stopped)
    with pytest.raises(RuntimeError), joined(run, reports=False):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RunStopped), joined(run, reports=True) as current:
        current.facts.update(first_step=4, last_step=8)
        raise RunStopped("stopped by SIGUSR2 at step 8")
    status = run.read_status()
    assert stopped.items() <= status.items()
    assert (status["first_step"], status["last_step"]) == (4, 8)


def test_a_failure_that_is_on_record_stays_although_the_others_stop(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.write_status(state="failed", reason="rank 1 has hung", exit_status=1)
    with pytest.raises(RunStopped), joined(run, reports=True):
        raise RunStopped("stopped by SIGTERM at step 8")
    assert run.read_status()["reason"] == "rank 1 has hung"


def test_an_interrupt_while_the_end_is_put_down_does_not_lose_the_record(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")

    class Slow:
        def begin(self) -> None: ...

        def __call__(self, *_: object) -> tuple[str, str | None, dict[str, object]]:
            send(INT)
            raise AssertionError("not interrupted")

    with pytest.raises(RunStopped), attempt(run, Slow()) as current, current.stop.deferred():
        send(INT)
        raise RunStopped("stopped by SIGINT at step 3")
    (line,) = read_jsonl(run.attempts)
    assert (line["ended"], line["reason"]) == ("stopped", "stopped by SIGINT at step 3")
    assert run.read_status()["state"] == "stopped"


def test_a_run_whose_end_cannot_be_put_into_words_has_failed_and_is_not_done(tmp_path: Path) -> None:
    class Odd(RunStopped):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "hint" and value:
                raise RuntimeError("a mistake of ours")
            super().__setattr__(name, value)

    run = RunDir(tmp_path / "run")
    with pytest.raises(RuntimeError), attempt(run):
        raise Odd("stopped by SIGINT at step 3")
    (line,) = read_jsonl(run.attempts)
    assert (line["ended"], run.read_status()["state"]) == ("failed", "failed")
