"""cancel: asks before it takes away, reaches only what it can reach, and leaves a run that can go on."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cli_runs import ready_here
from sft_dist.errors import SftDistError
from sft_dist.files import write_json
from sft_dist.jobs import cancel as cancel_module
from sft_dist.jobs.cancel import cancel, holder
from sft_dist.jobs.records import read_record
from sft_dist.jobs.stacks import state_of
from sft_dist.rundir import RunDir
from tests.conftest import RunCli

# Holds a run as a training does; saves on SIGTERM, unless it is told to be deaf.
HOLDER = """
import signal, sys, time
from pathlib import Path
from sft_dist.rundir import RunDir
run, deaf, asked = RunDir(Path(sys.argv[1])), len(sys.argv) > 2, []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with run.locked():
    run.write_status(state="running", step=2, attempt=1)
    print("here", flush=True)
    while deaf or not asked:
        time.sleep(0.05)
    run.write_status(state="stopped", reason="stopped by SIGTERM at step 2", checkpoint="checkpoint-2")
"""
# A queue of one job in a file: scancel without a signal takes it away, with one it lets it end if ENDS is there.
SQUEUE = '[ -s {box}/state ] && echo "12|$(cat {box}/state)|2020-01-01T00:00:00|N/A|1|Priority"; exit 0'
SCANCEL = """echo "$*" >> {box}/calls
[ -e {box}/refuses ] && {{ echo 'scancel: error: Kill job error on job id 12: Access/permission denied' >&2; exit 1; }}
case "$*" in
  --signal*) [ -e {box}/ends ] && : > {box}/state; exit 0;;
  *) : > {box}/state;;
esac"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel_module, "POLL_S", 0.1)
    monkeypatch.setenv("SLURM_CONF", "/nowhere")


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a queue that has job 12 in the state that its file `state` holds."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in (("squeue", SQUEUE), ("scancel", SCANCEL), ("sacct", "exit 0")):
        (folder / name).write_text(f"#!/bin/bash\n{script.format(box=folder)}\n", encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def calls(box: Path) -> list[str]:
    return (box / "calls").read_text(encoding="utf-8").splitlines() if (box / "calls").exists() else []


def made(state: str, job: Any = None, **status: Any) -> RunDir:
    run = RunDir(Path("runs/demo").absolute())
    run.path.mkdir(parents=True)
    run.config.write_text("run: {}\n", encoding="utf-8")
    run.write_status(state=state, **status)
    if job:
        write_json(run.path / "slurm" / "job.json", job)
    return run


JOB = {"jobs": [{"job_id": "12"}]}

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """`hold(run)` starts a process that works on the run."""
    started: list[subprocess.Popen[str]] = []

    def start(run: RunDir, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(run.path), *words]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "here\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


# --- on this host ----------------------------------------------------------------------------------------------------


def test_a_process_here_saves_and_ends(hold: Hold, run_cli: RunCli) -> None:
    run = made("queued")
    process = hold(run)
    done = run_cli("cancel", run.path)
    assert done.returncode == 0, done.stderr
    assert process.wait(10) == 0
    assert done.stdout.splitlines()[0] == "run demo: stopped"
    assert f"next        sft-dist resume {run.path}" in done.stdout
    assert run.read_status()["checkpoint"] == "checkpoint-2"
    assert run.cancelled.exists()


def test_a_process_that_does_not_end_is_not_killed_unless_asked(hold: Hold) -> None:
    run = made("queued")
    process = hold(run, "deaf")
    with pytest.raises(SftDistError, match=r"still there after 0 s\n.*--now"):
        cancel(run, wait_s=0.3)
    assert process.poll() is None
    after = cancel(run, now=True)
    assert process.wait(10) == -signal.SIGKILL
    assert (after.state, after.record.status["reason"]) == ("stopped", "cancelled")


# Holds a run, with a worker of its own that hears nothing.
LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
from sft_dist.rundir import RunDir
run = RunDir(Path(sys.argv[1]))
with run.locked():
    run.write_status(state="running", attempt=1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    print(subprocess.Popen([sys.executable, "-c", deaf]).pid, flush=True)
    time.sleep(60)
"""


def test_now_leaves_no_worker_behind_that_would_save() -> None:
    run = made("queued")
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert cancel(run, now=True).state == "stopped"
        assert process.wait(10) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while state_of(worker) not in "XZ":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_elsewhere_is_not_looked_for_by_its_number(hold: Hold) -> None:
    run = made("queued")
    with run.locked():
        run.lock.write_text("process 1 on elsewhere\n", encoding="utf-8")
        with pytest.raises(SftDistError, match=r"process 1 on elsewhere, which cannot be reached"):
            cancel(run)
        assert not run.cancelled.exists()
        # A number that has gone to another process of this host.
        run.lock.write_text(f"process {os.getppid()} on {socket.gethostname()}\n", encoding="utf-8")
        assert holder(read_record(run)) is None
        run.lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        assert holder(read_record(run)) == os.getpid()


def test_a_run_of_another_host_cannot_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("running")
    run.lock.write_text("process 12 on elsewhere\n", encoding="utf-8")
    with pytest.raises(SftDistError, match="cannot be reached from here") as caught:
        cancel(run)
    assert caught.value.exit_code == 1
    assert run.read_status()["state"] == "running"
    assert not run.cancelled.exists()


def test_a_run_whose_process_is_gone_is_marked_stopped() -> None:
    run = made("running", checkpoint="checkpoint-4")
    run.lock.write_text(f"process 4194304 on {socket.gethostname()}\n", encoding="utf-8")
    assert cancel(run).state == "stopped"


def test_a_run_that_nothing_has_started_is_marked_stopped() -> None:
    run = made("queued")
    assert (cancel(run).state, run.read_status()["reason"]) == ("stopped", "cancelled")


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_a_run_that_has_ended_is_left_as_it_is(state: str) -> None:
    run = made(state, reason="as it was")
    before = run.read_status()
    assert cancel(run).state == state
    assert run.read_status() == before
    assert not run.cancelled.exists()


def test_resume_takes_the_mark_away() -> None:
    run = made("stopped")
    run.cancelled.touch()
    run.config.write_text("model: {name: /no/such/model}\n", encoding="utf-8")
    assert ready_here(str(run.path), accept=False) == run
    assert not run.cancelled.exists()


def test_the_mark_stays_where_nothing_can_be_resumed(run_cli: RunCli) -> None:
    run = made("stopped")
    run.cancelled.touch()
    run.config.write_text("no: config\n", encoding="utf-8")
    assert run_cli("resume", run.path).returncode == 2
    assert run.cancelled.exists()


def test_looking_does_not_keep_a_run_from_starting() -> None:
    run = made("queued")
    looker = "import sys, time; from pathlib import Path; from sft_dist.rundir import RunDir\n"
    looker += "end = time.monotonic() + 0.5\nwhile time.monotonic() < end: RunDir(Path(sys.argv[1])).held()"
    run.lock.touch()
    with subprocess.Popen([sys.executable, "-c", looker, str(run.path)]) as process:
        starts = 0
        while process.poll() is None:
            with run.locked():
                starts += 1
            time.sleep(0.001)
    assert process.returncode == 0, "nobody looked"
    assert starts > 0


# --- on SLURM --------------------------------------------------------------------------------------------------------


def test_a_waiting_job_leaves_the_queue_at_once(box: Path) -> None:
    (box / "state").write_text("PENDING")
    run = made("queued", JOB)
    assert (cancel(run).state, run.read_status()["reason"]) == ("stopped", "cancelled")
    assert calls(box) == ["12"]
    assert run.cancelled.exists()


def test_a_running_job_is_asked_first(box: Path) -> None:
    (box / "state").write_text("RUNNING")
    (box / "ends").touch()
    run = made("running", JOB, checkpoint="checkpoint-8")
    after = cancel(run)
    assert calls(box) == ["--signal=USR1 12"]
    assert (after.state, after.record.status["reason"]) == ("stopped", "cancelled; kept: checkpoint-8")
    assert after.next_command == f"sft-dist submit {run.path}"


def test_a_job_that_stays_is_taken_away_after_the_wait(box: Path) -> None:
    (box / "state").write_text("RUNNING")
    started = time.monotonic()
    assert cancel(made("running", JOB), wait_s=0.5).state == "stopped"
    assert calls(box) == ["--signal=USR1 12", "12"]
    assert 0.5 <= time.monotonic() - started < 10


def test_now_does_not_ask(box: Path) -> None:
    (box / "state").write_text("RUNNING")
    assert cancel(made("running", JOB), now=True).state == "stopped"
    assert calls(box) == ["12"]


def test_a_stopped_run_that_waits_to_go_on_is_cancelled_too(box: Path) -> None:
    (box / "state").write_text("PENDING")
    run = made("stopped", JOB, reason="stopped by SIGUSR2 at step 5")
    after = cancel(run)
    assert (after.state, after.record.status["reason"]) == ("stopped", "stopped by SIGUSR2 at step 5")
    assert calls(box) == ["12"]


def test_a_refusal_is_said_and_leaves_no_mark(box: Path) -> None:
    (box / "state").write_text("RUNNING")
    (box / "refuses").touch()
    run = made("running", JOB)
    with pytest.raises(SftDistError, match="Access/permission denied"):
        cancel(run)
    assert not run.cancelled.exists()
    assert run.read_status()["state"] == "running"


def test_without_a_queue_a_job_cannot_be_cancelled(box: Path) -> None:
    (box / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n", encoding="utf-8")
    for state in ("running", "stopped"):  # a stopped one may wait in the queue
        run = made(state, JOB)
        with pytest.raises(SftDistError, match=r"job 12 cannot be reached from here .squeue: Unable to contact"):
            cancel(run)
        assert not run.cancelled.exists()
        run.path.rename(run.path.with_name(state))
    assert calls(box) == []
