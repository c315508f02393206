"""Hangs on real processes: who is stuck is on record in seconds, with all stacks, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.files import read_jsonl
from sft_dist.jobs.launcher import children
from sft_dist.jobs.stacks import state_of
from sft_dist.rundir import RunDir

TinyRun = Callable[..., RunDir]
Start = Callable[..., "subprocess.Popen[str]"]
TWO = ("parallel.plan=ddp", "parallel.num_processes=2", "train.max_steps=1000000")


@pytest.fixture
def resume(start: Start, tmp_path: Path) -> Start:
    """`resume(run, site)` resumes a run; Python runs the code `site` when each of its processes starts."""

    def begin(run: RunDir, site: str = "") -> subprocess.Popen[str]:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(site)
        return start("-m", "sft_dist", "resume", run.path, PYTHONPATH=path_with(tmp_path / "site"))

    return begin


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def step(run: RunDir) -> int:
    return max((row["step"] for row in read_jsonl(run.metrics)), default=0)


def rank_of(pid: int) -> int:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry.partition(b"=")[2]) for entry in entries if entry.startswith(b"RANK="))


def report_of(run: RunDir) -> str:
    (report,) = run.logs.glob("hang-*.txt")
    return report.read_text()


def parts(report: str) -> list[str]:
    """What the report holds of each rank."""
    return report.split("--- rank ")[1:]


def test_a_stopped_rank_is_named_and_the_one_that_waits_shows_its_stacks(
    resume: Start, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """The other one is blocked in a gloo collective, and writes its stacks out of it; a stopped one cannot."""
    run = tiny_run(tmp_path, "stopped", *TWO, "train.hang_timeout=2")
    process = resume(run)
    until(lambda: step(run) >= 5, process)
    (agent,) = children(process.pid)
    pids = {rank_of(pid): pid for pid in children(agent)}
    os.kill(pids[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    reason = run.read_status()["reason"]
    assert reason.startswith(f"hang: rank 1 (process {pids[1]} on "), reason
    assert "stopped, by SIGSTOP" in reason
    assert f"error: {reason}" in err
    (attempt,) = read_jsonl(run.attempts)
    assert (attempt["ended"], attempt["reason"]) == ("failed", reason)
    assert (attempt["failure"]["kind"], attempt["failure"]["rank"]) == ("hang", 1)
    waiting, stopped = parts(report_of(run))
    assert "stopped and cannot answer" in stopped
    assert "most recent call first" in waiting
    assert "trainer.py" in waiting
    assert not [pid for pid in (agent, *pids.values()) if state_of(pid) not in "XZ"]


# Rank 1 stays in its fifth step.
SLEEPY = """
import os, sys, threading, time
if os.environ.get("RANK") == "1":
    def patch():
        while "sft_dist.train.trainer" not in sys.modules or not hasattr(sys.modules["sft_dist.train.trainer"], "build_trainer"):
            time.sleep(0.01)
        import sft_dist.train.loss as loss
        plain, calls = loss.trained_token_loss, []
        def sleepy(*args, **kwargs):
            calls.append(1)
            if len(calls) == 20:
                time.sleep(600)
            return plain(*args, **kwargs)
        loss.trained_token_loss = sleepy
    threading.Thread(target=patch, daemon=True).start()
"""


def test_a_rank_that_stays_in_its_step_is_told_from_the_one_that_waits_for_it(
    resume: Start, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, "asleep", *TWO, "train.hang_timeout=2")
    process = resume(run, SLEEPY)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1, err
    reason = run.read_status()["reason"]
    assert reason.startswith("hang: rank 1 "), f"{reason}\n{report_of(run)}"
    assert "in phase step" in reason
    assert "not in a collective, where the others wait" in reason
    assert "sleepy" in parts(report_of(run))[1]
