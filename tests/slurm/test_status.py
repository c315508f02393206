"""status, logs and cancel against a real SLURM. The jobs are small scripts that write a run directory as a worker does."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sft_dist.files import read_json, write_json
from sft_dist.jobs.cancel import cancel
from sft_dist.jobs.logs import Follower
from sft_dist.jobs.queue import Queue, ask_accounting, ask_queue
from sft_dist.jobs.status import RunStatus, look
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.slurm.conftest import Lab, StartLab

pytestmark = pytest.mark.slurm

# A task of a job: notes that it runs, and on SIGUSR1 saves for a second, notes that it has stopped, and ends.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from sft_dist.rundir import RunDir
run, task, asked = RunDir(Path(sys.argv[1])), int(os.environ["SLURM_PROCID"]), []
signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
print(f"task {task} of attempt {os.environ.get('SLURM_RESTART_COUNT', '0')} is here", flush=True)
with run.locked() if task == 0 else open(os.devnull):
    while not asked:
        if task == 0:
            run.write_status(state="running", step=3, max_steps=10, attempt=1)
        time.sleep(0.2)
    time.sleep(1)
    if task == 0:
        (run.path / "saved").touch()
        run.write_status(state="stopped", reason="stopped by SIGUSR1 at step 3", checkpoint="checkpoint-3")
"""
STEP = "srun --output={run}/slurm/%j_%t_log.out {python} {worker} {run}\n"
# As the job of `submit` does; a batch script may outlive its step for a moment when its job is cancelled.
JOB = f"""{STEP}[ -e {{run}}/.cancelled ] || scontrol requeue $SLURM_JOB_ID
"""


def submitted(lab: Lab, *options: str, script: str = JOB) -> tuple[RunDir, str]:
    """A run whose job has been queued, with what `submit` notes about it."""
    run = RunDir(Path("runs/demo").absolute())
    (run.path / "slurm").mkdir(parents=True)
    run.config.write_text("run: {}\n", encoding="utf-8")
    run.write_status(state="queued", step=0, attempt=0)
    Path("worker.py").write_text(WORKER, encoding="utf-8")
    text = script.format(run=shlex.quote(str(run.path)), python=sys.executable, worker=Path("worker.py").absolute())
    job = lab.submit(text, *options)
    write_json(run.path / "slurm" / "job.json", {"jobs": [{"job_id": job, "nodes": 1, "gpus_per_node": 2}]})
    return run, job


def seen(run: RunDir) -> RunStatus:
    statuses, notes = look([run])
    assert not notes
    return statuses[0]


def wait_for_state(lab: Lab, run: RunDir, job: str, state: str) -> RunStatus:
    lab.eventually(lambda: seen(run).state == state, job=job)
    return seen(run)


def both_lines(lab: Lab, follower: Follower, job: str) -> list[tuple[str, str]]:
    """What two tasks print at their start, a line each, sorted, once both have."""
    lines: list[tuple[str, str]] = []

    def there() -> bool:
        lines.extend(follower.news())
        return len(lines) >= 2

    lab.eventually(there, job=job)
    return sorted(lines)


def test_a_waiting_job_is_queued_and_cancel_takes_it_away(lab: Lab) -> None:
    run, job = submitted(lab, "--begin=now+2hours")
    status = seen(run)
    assert (status.state, status.verdict.why, status.job_id) == ("queued", "BeginTime", job)
    assert status.verdict.starts is not None
    after = cancel(run)
    assert (after.state, after.record.status["reason"]) == ("stopped", "cancelled")
    assert lab.job(job)["JobState"] == "CANCELLED"
    assert run.cancelled.exists()


def test_cancel_lets_a_running_job_save_and_nothing_requeues_it(each_lab: Lab, run_cli: RunCli) -> None:
    run, job = submitted(each_lab, "--requeue")
    status = wait_for_state(each_lab, run, job, "running")
    each_lab.eventually(lambda: seen(run).step == 3, job=job)
    assert (status.nodes, status.job_id) == (1, job)
    done = run_cli("cancel", run.path, env=each_lab.env)
    assert done.returncode == 0, done.stderr
    assert (run.path / "saved").exists()
    status = seen(run)
    assert (status.state, status.record.status["checkpoint"]) == ("stopped", "checkpoint-3")
    assert each_lab.job(job)["JobState"] in ("COMPLETED", "COMPLETING")
    assert "next        sft-dist submit" in done.stdout


def test_a_job_that_does_not_listen_is_taken_away_after_the_wait(lab: Lab) -> None:
    run, job = submitted(lab, script="""srun bash -c 'trap "" USR1; echo deaf; sleep 300'""")
    lab.wait_for_output(job, "deaf")
    run.write_status(state="running", step=1)
    status = cancel(run, wait_s=2)
    assert (status.state, status.record.status["reason"]) == ("stopped", "cancelled")
    assert lab.job(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("options", [(), ("--no-accounting",)], ids=["accounting", "no accounting"])
def test_a_job_that_was_killed_leaves_a_lost_run(use_lab: StartLab, options: tuple[str, ...]) -> None:
    lab = use_lab(*options)
    run, job = submitted(lab, script=STEP)
    lab.eventually(lambda: seen(run).step == 3, job=job)
    lab.run("scancel", job)
    lab.wait_for(job, "CANCELLED")
    status = wait_for_state(lab, run, job, "lost")
    assert status.verdict.why == f"job {job} ended: CANCELLED"
    assert status.next_command == f"sft-dist submit {run.path}"


def test_a_run_that_waits_to_go_on_is_queued_and_its_logs_go_on(lab: Lab) -> None:
    run, job = submitted(lab, "--nodes=2", "--ntasks-per-node=1", "--requeue")
    follower = Follower(run)
    wait_for_state(lab, run, job, "running")
    # Each task has said its line, so each listens to the signal: a Python that still starts would die of it in silence.
    before = both_lines(lab, follower, job)
    assert before == [("n0", "task 0 of attempt 0 is here"), ("n1", "task 1 of attempt 0 is here")]
    lab.eventually(lambda: seen(run).step == 3, job=job)
    assert seen(run).nodes == 2
    lab.run("scancel", "--signal=USR1", job)
    status = wait_for_state(lab, run, job, "queued")
    assert status.verdict.live
    assert read_json(run.status)["state"] == "stopped"
    lab.hurry(job)
    wait_for_state(lab, run, job, "running")
    again = both_lines(lab, follower, job)
    assert again == [("n0", "task 0 of attempt 1 is here"), ("n1", "task 1 of attempt 1 is here")]
    cancel(run)


def test_jobs_that_the_cluster_does_not_know(lab: Lab) -> None:
    assert not ask_queue(["99999999"]).jobs
    assert ask_queue(["99999999"]).known
    assert not ask_accounting(ask_queue(["99999998", "99999999"]), ["99999999"]).jobs
    run, job = submitted(lab, "--hold")
    write_json(run.path / "slurm" / "job.json", {"job_id": "99999999"})
    assert (seen(run).state, seen(run).verdict.why) == ("lost", "job 99999999 is not in the queue any more")
    lab.run("scancel", job)


def test_tasks_of_an_array_are_told_apart(lab: Lab) -> None:
    run, job = submitted(lab, "--array=0-1", "--begin=now+1hours")
    write_json(run.path / "slurm" / "job.json", {"job_id": job, "array_task": 1})
    assert (seen(run).state, seen(run).job_id) == ("queued", f"{job}_1")
    assert cancel(run).state == "stopped"
    left = lab.run("squeue", "--noheader", "--array", "--format=%i", f"--jobs={job}").split()
    assert left == [f"{job}_0"]
    lab.run("scancel", job)


def test_the_accounting_knows_how_a_job_ended(lab: Lab) -> None:
    run, job = submitted(lab, script=STEP)
    wait_for_state(lab, run, job, "running")
    lab.run("scancel", job)
    lab.wait_for(job, "CANCELLED")
    lab.eventually(lambda: job in ask_accounting(Queue(known=True), [job]).jobs)
    found = ask_accounting(Queue(known=True), [job]).jobs[job]
    assert (found.state, found.phase) == ("CANCELLED", "ended")
    assert found.end is not None


def test_the_command_shows_json(lab: Lab, run_cli: RunCli) -> None:
    run, job = submitted(lab, "--hold")
    done = run_cli("status", run.path, "--json", env=lab.env)
    assert json.loads(done.stdout)["runs"][0]["job_id"] == job
    assert json.loads(done.stdout)["runs"][0]["why"] == "JobHeldUser"
    lab.run("scancel", job)
