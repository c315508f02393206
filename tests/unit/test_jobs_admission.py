"""Whether a run may be submitted, and what --after waits for: with stand-ins for SLURM's commands."""

from __future__ import annotations

import multiprocessing
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cli_runs import config_again, ready_again, ready_here
from sft_dist.errors import ConfigError
from sft_dist.files import write_json
from sft_dist.jobs import queue
from sft_dist.jobs.admission import job_numbers, refuse_taken, submitting
from sft_dist.rundir import RunDir

Fake = Callable[[str, str], None]
# 12 waits, 13 has ended well, 14 badly; SLURM has forgotten 15, which accounting knows, and 16.
JOBS = {
    "squeue": "for i in '12|PENDING' '13|COMPLETED' '14|FAILED'; do echo \"$i|N/A|N/A|1|Priority\"; done",
    "scontrol": 'case "$4" in 12) echo JobState=PENDING;; 13) echo JobState=COMPLETED;; 14) echo JobState=FAILED;; '
    '20) echo "JobState=COMPLETED x"; echo "JobState=RUNNING";; '
    "*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;; esac",
    "sacct": "echo '15|COMPLETED|Unknown|Unknown|1'",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake("squeue", "echo ...")` puts a command on a PATH that has no other of SLURM's."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/nowhere")
    monkeypatch.setenv("SLURM_CONF", "/nowhere")
    (tmp_path / "bin").mkdir()

    def make(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.fixture
def slurm(fake: Fake) -> None:
    for name, script in JOBS.items():
        fake(name, script)


def made(name: str, state: str, **job: Any) -> RunDir:
    run = RunDir(Path("runs") / name)
    run.path.mkdir(parents=True)
    run.config.write_text("slurm: {time: 10}\n", encoding="utf-8")
    run.write_status(state=state)
    if job:
        write_json(run.path / "slurm" / "job.json", {"jobs": [job]})
    return run


def test_a_job_of_the_run_that_waits_refuses_another_and_the_deletion(slurm: None) -> None:
    run = made("a", "queued", job_id="12")
    for call in (lambda: ready_again(run, ["slurm.time=20"]), lambda: refuse_taken(run, overwrite=True)):
        with pytest.raises(ConfigError, match="job 12 is PENDING"):
            call()
    assert "time: 10" in run.config.read_text()
    assert ready_again(made("b", "stopped", job_id="14"), ["slurm.time=20"]).slurm.time == 20
    refuse_taken(made("c", "queued"), overwrite=True)
    refuse_taken(RunDir(Path("runs/none")), overwrite=True)


def test_a_resume_beside_a_job_is_refused_and_keeps_the_mark_of_cancel(slurm: None) -> None:
    """Both would train, or the job that is about to save and end would come back."""
    run = made("a", "stopped", job_id="12")
    run.cancelled.touch()
    with pytest.raises(ConfigError, match="job 12 is PENDING"):
        ready_here(str(run.path), accept=False)
    assert run.cancelled.exists()
    other = made("b", "running")
    other.cancelled.touch()
    with other.locked(), pytest.raises(ConfigError, match="another process works on it"):
        ready_here(str(other.path), accept=True)
    assert [path.name for path in other.path.glob("accepted*")] == []
    assert other.cancelled.exists()
    assert ready_here(str(other.path), accept=False) == other
    assert not other.cancelled.exists()


def test_a_local_jobs_number_is_none_of_slurms(slurm: None) -> None:
    """It is that of a process; another user's job may have it."""
    assert ready_again(made("a", "stopped", job_id="12", cluster="local"), [])
    with pytest.raises(ConfigError, match="no job in the queue"):
        job_numbers(["a"])


@pytest.mark.parametrize("state", ["stopped", "failed", "queued"])
def test_a_queue_that_does_not_answer_is_no_leave(fake: Fake, state: str) -> None:
    """Two jobs would work on the same run if one waits already."""
    fake("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConfigError, match="cannot be told here"):
        ready_again(made("a", state, job_id="12"), [])
    assert ready_again(made("b", state), [])


def test_without_slurm_only_what_is_said_to_be_alive_is_refused(fake: Fake) -> None:
    assert ready_again(made("a", "stopped", job_id="12"), [])
    with pytest.raises(ConfigError, match="cannot be told here"):
        ready_again(made("b", "queued", job_id="12"), [])


def test_the_config_that_a_dry_run_shows_is_not_written(slurm: None) -> None:
    run = made("a", "stopped")
    before = run.config.read_bytes()
    assert config_again(run, ["slurm.time=33"]).slurm.time == 33
    assert run.config.read_bytes() == before
    with pytest.raises(ConfigError, match=r"slurm\.profile"):
        config_again(run, ["slurm.profile=big"])


def _hold(path: str, here: Any, done: Any) -> None:
    with submitting(RunDir(Path(path))):
        here.set()
        done.wait(60)


def test_of_two_submissions_at_once_one_is_refused(tmp_path: Path) -> None:
    run = made("a", "stopped")
    context = multiprocessing.get_context("fork")
    here, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(run.path.absolute()), here, done))
    other.start()
    assert here.wait(60)
    with pytest.raises(ConfigError, match="being submitted by another process"), submitting(run):
        pass
    done.set()
    other.join(60)
    with submitting(run):
        pass


def test_after_waits_for_what_can_still_be_done(slurm: None) -> None:
    made("waits", "queued", job_id="12")
    made("done", "done", job_id="13")
    assert job_numbers(["waits", "done", "12", "13", "15", "20"]) == ["12", "12", "20"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("14", "that job is FAILED"),
        ("16", "not known to SLURM"),
        ("failed", "that run is failed and has no job"),
        ("stopped", "that run is stopped and has no job"),
    ],
)
def test_after_refuses_what_will_never_be_done(slurm: None, name: str, why: str) -> None:
    """SLURM starts a job at once whose dependency it has forgotten."""
    made("failed", "failed", job_id="14")
    made("stopped", "stopped")
    with pytest.raises(ConfigError, match=why):
        job_numbers([name])


def test_after_a_queue_that_hangs_is_no_guess(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "TIMEOUT_S", 0.2)
    for name in ("squeue", "scontrol", "sacct"):
        fake(name, "read -t 60 < <(:; exec /bin/sleep 60)")
    made("a", "queued", job_id="12")
    with pytest.raises(ConfigError, match="no answer within"):
        job_numbers(["a"])
    assert job_numbers(["12"]) == ["12"]  # sbatch will say
