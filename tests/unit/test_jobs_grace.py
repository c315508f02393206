"""How long processes that were told to stop may take, and what is said of those that did not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_dist.jobs import grace, launcher, watchdog
from sft_dist.jobs.beats import Pulse
from sft_dist.jobs.grace import Grace, grace_s
from sft_dist.jobs.hang import Seen, overdue
from sft_dist.jobs.place import Place
from sft_dist.rundir import RunDir

JOB = Place("7", 0, ("n1",), 0, 0, 1, "n1", 20000, "/run", marker="/slurm/requeue.7.0")
USR1, USR2, TERM, INT = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


def a_run(folder: Path, stop_timeout: str = "auto", delay: int = 120, pace: dict[str, float] | None = None) -> RunDir:
    run = RunDir(folder / "run")
    run.plan.mkdir(parents=True)
    run.config.write_text(f"train: {{stop_timeout: {stop_timeout}}}\nslurm: {{signal_delay_s: {delay}}}\n")
    if pace is not None:
        (run.plan / "pace.json").write_text(json.dumps(pace))
    return run


@pytest.mark.parametrize(
    ("stop_timeout", "delay", "pace", "place", "number", "seconds"),
    [
        ("auto", 120, None, JOB, USR2, 105.0),
        ("auto", 20, None, JOB, TERM, 10.0),
        ("auto", 20, None, JOB, USR1, 600.0),
        ("auto", 20, None, None, TERM, 600.0),
        ("auto", 120, {"step_s": 20.0, "save_s": 400.0}, None, INT, 855.0),
        ("auto", 120, {"step_s": 20.0, "save_s": 400.0}, JOB, USR2, 105.0),
        ("60", 120, None, JOB, USR2, 45.0),
        ("60", 120, None, None, INT, 45.0),
        ("8", 120, None, None, INT, 4.0),
        ("null", 120, None, JOB, USR2, None),
    ],
)
def test_the_time_follows_from_who_asks(
    tmp_path: Path,
    stop_timeout: str,
    delay: int,
    pace: dict[str, float] | None,
    place: Place | None,
    number: int,
    seconds: float | None,
) -> None:
    assert grace_s(a_run(tmp_path, stop_timeout, delay, pace), place, number) == seconds


def test_the_time_runs_from_the_first_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(grace.time, "monotonic", lambda: now[0])
    heard: list[int] = []
    left = Grace(a_run(tmp_path, "60"), None, heard)
    now[0] += 1000
    assert not left.over()
    heard.append(TERM)
    assert not left.over()
    now[0] += 44.9
    heard.append(TERM)
    assert not left.over()
    now[0] += 0.2
    assert left.over()
    assert (left.asked, left.seconds) == ("SIGTERM", 45.0)


def test_who_did_not_end_is_named() -> None:
    waits = Seen(0, "n1", 11, 4, "step", 12.0, 300.0, "S", waits=True)
    stuck = Seen(1, "n2", 12, 3, "save", 45.0, 300.0, "T")
    ended = Seen(2, "n2", 13, 4, "ended", 1.0, 300.0, "S")
    text = overdue([waits, stuck, ended], "SIGUSR2", 45.0, "stacks in logs/overdue-n2.txt")
    assert text == (
        "ranks 0, 1 of 3 had not ended 45 s after SIGUSR2; rank 1 (process 12 on n2) is in phase save after step 3 for 45 s, "
        "stopped, by SIGSTOP or a debugger; stacks in logs/overdue-n2.txt"
    )


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that catches SIGUSR2 once it has written a line."""
    code = "import signal, time; signal.signal(signal.SIGUSR2, lambda *_: None); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_worker_that_could_not_hear_yet_is_told_later(sleeper: subprocess.Popen[bytes]) -> None:
    deaf = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert sleeper.stdout is not None
        sleeper.stdout.readline()
        assert launcher._pass_on([USR2, USR2], []) == 0
        assert launcher._pass_on([USR2], [sleeper.pid, deaf.pid]) == 0
        assert launcher._pass_on([USR2, USR2, TERM], [sleeper.pid]) == 2, "SIGTERM would kill it"
        assert sleeper.poll() is None
    finally:
        deaf.kill()
        deaf.wait()


@pytest.mark.parametrize("beats", [True, False])
def test_giving_up_is_a_stop_on_record_with_the_stacks(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    run = a_run(tmp_path)
    if not beats:
        run.config.write_text("train: {hang_timeout: null}\n")
    run.write_status(state="running")
    dog = watchdog.Watchdog(run, 1)
    if dog.folder is not None:
        pulse = Pulse(dog.folder, 0)
        pulse.beat("save", 6)
        # The beat is the sleeper's, as far as the watchdog can tell.
        found = watchdog.read_beats(dog.folder)
        import dataclasses

        monkeypatch.setattr(watchdog, "read_beats", lambda folder: [dataclasses.replace(found[0], pid=sleeper.pid)])
    began = time.monotonic()
    dog.give_up("SIGTERM", 45.0, [sleeper.pid])
    assert time.monotonic() - began < 30
    run.write_status(state="failed", reason="rank 0 was killed by SIGKILL")  # by torchrun, as it sees it end
    dog.close()
    status = run.read_status()
    assert status["state"] == "stopped"
    assert status["reason"].startswith("rank 0 of 1 had not ended 45 s after SIGTERM")
    assert ("in phase save after step 6" in status["reason"]) == beats
    assert "there is no checkpoint to go on from; stacks in logs/overdue-" in status["reason"]
    (report,) = run.logs.glob("overdue-*.txt")
    assert f"process {sleeper.pid}" in report.read_text()
