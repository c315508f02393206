"""submit against a real SLURM: the tiny model on two nodes with two processes each, over gloo."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sft_dist.files import read_jsonl, utc_now
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.slurm.conftest import Lab, StartLab

pytestmark = pytest.mark.slurm
pytest.importorskip("submitit")

# Loading torch four times on two cores takes most of it.
PATIENCE = 300
PLAIN = (
    "data.eval_size=0",
    "train.eval_strategy=no",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
    "checkpoint.save_strategy=no",
)
TWO_BY_TWO = (
    "parallel.plan=ddp",
    "parallel.num_processes=2",
    "slurm.nodes=2",
    "slurm.cpus_per_task=2",
    "slurm.time=10",
)
ENV = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

Submit = Callable[..., tuple[RunDir, str]]


@pytest.fixture
def submit(run_cli: RunCli, tmp_path: Path) -> Submit:
    """`submit("name", *words)` submits the smoke recipe; returns the run and its (last) job's number."""

    def call(name: str, *words: str) -> tuple[RunDir, str]:
        done = run_cli("submit", *words, env=ENV)
        assert done.returncode == 0, done.stderr
        return RunDir(tmp_path / "runs" / name), done.stdout.split()[-2]

    return call


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_jsonl(run.metrics) if "loss" in row]


def past_step(run: RunDir, step: int) -> Callable[[], bool]:
    """Whether it trains from now on and is past `step`; a run that has ended in the meantime fails the test at once."""
    now = utc_now()

    def reached() -> bool:
        status = run.read_status()
        assert status.get("state") not in ("done", "failed"), status
        # Not the status' step: that is written every five seconds only, in which these runs take a hundred of them.
        fresh = (row for row in read_jsonl(run.metrics) if row["time"] > now)
        return status.get("state") == "running" and any(row["step"] > step for row in fresh)

    return reached


def decisions(run: RunDir) -> list[str]:
    return [row["decided"] for row in read_jsonl(run.attempts)]


def state(run: RunDir, *wanted: str) -> Callable[[], bool]:
    return lambda: run.read_status().get("state") in wanted


def test_two_runs_at_once_train_as_four_processes_here(
    lab: Lab, submit: Submit, run_cli: RunCli, tmp_path: Path
) -> None:
    """Both on the same two nodes: one task a node with torchrun inside, and a task a process."""
    ways = {
        name: submit(name, "smoke", *TWO_BY_TWO, *PLAIN, f"run.name={name}", f"slurm.tasks_per_node={name}")
        for name in ("one", "gpu")
    }
    here = ("parallel.plan=ddp", "parallel.num_processes=4", "run.name=here")
    assert run_cli("train", "smoke", *here, *PLAIN, env=ENV).returncode == 0
    for name, (run, job) in ways.items():
        lab.wait_for(job, patience=PATIENCE)
        assert run.read_status()["state"] == "done"
        assert losses(run) == losses(RunDir(tmp_path / "runs" / "here")), name
        (line,) = read_jsonl(run.attempts)
        assert (line["job_id"], line["nodes"], line["restart"], line["decided"]) == (job, lab.nodes, 0, "done")
        assert (run.plan / "job.sbatch").read_text() == next(run.path.glob(f"slurm/{job}_submission.sh")).read_text()


def test_preempted_it_comes_back_and_finishes(each_lab: Lab, submit: Submit) -> None:
    """Under linuxproc it then reaches its time limit, too; the signal of that takes the same way under cgroup."""
    lab, steps = each_lab, 300  # so many that it does not finish before it is preempted
    run, job = submit("long", "smoke", *TWO_BY_TWO, *PLAIN, "run.name=long", f"train.max_steps={steps}")
    lab.eventually(past_step(run, 3), PATIENCE, job)
    # All of both nodes, so that the job must leave.
    lab.submit("true", "--partition=high", "--nodes=2", "--exclusive")
    lab.hurry(job)
    expected = ["requeue 1 of 10: preemption"]
    if "cgroup" not in lab.options:
        lab.eventually(past_step(run, run.read_status()["step"] + 3), PATIENCE, job)
        lab.run("scancel", "--signal=USR2", job)
        lab.hurry(job)
        expected.append("requeue 2 of 10: time limit")
    lab.wait_for(job, patience=PATIENCE)
    rows = read_jsonl(run.attempts)
    assert decisions(run) == [*expected, "done"]
    assert {row["job_id"] for row in rows} == {job}
    assert [row["first_step"] for row in rows] == [0, *(row["last_step"] for row in rows[:-1])]
    assert rows[-1]["last_step"] == steps
    assert run.read_status()["state"] == "done"


def test_the_lives_of_a_run(lab: Lab, submit: Submit, run_cli: RunCli) -> None:
    """Cancelled, submitted again, out of time and requeued, out of time for good, submitted again, a worker killed, anew there."""
    run, job = submit("lives", "smoke", *TWO_BY_TWO, *PLAIN, "run.name=lives", "train.max_steps=5000")
    lab.eventually(past_step(run, 2), PATIENCE, job)
    assert run_cli("cancel", "lives").returncode == 0
    lab.eventually(lambda: lab.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), PATIENCE, job)
    time.sleep(2)
    assert lab.job(job)["JobState"] not in ("PENDING", "RUNNING")
    assert run.read_status()["state"] == "stopped"

    # SLURM itself ends this one: its signal comes up to a minute before it was asked to, so within the job's first minute.
    run, job = submit("lives", "lives", "slurm.max_requeues=1", "slurm.time=2", "slurm.signal_delay_s=60")
    lab.eventually(lambda: len(read_jsonl(run.attempts)) == 2, PATIENCE, job)
    lab.hurry(job)
    lab.eventually(past_step(run, run.read_status()["step"] + 2), PATIENCE, job)
    lab.run("scancel", "--signal=USR2", job)
    lab.wait_for(job, "FAILED", patience=PATIENCE)
    assert run.read_status()["state"] == "stopped"

    run, job = submit("lives", "lives", "slurm.max_requeues=10", "slurm.time=10", "slurm.signal_delay_s=120")
    lab.eventually(past_step(run, run.read_status()["step"] + 2), PATIENCE, job)
    lab.run("pkill", "-KILL", "-n", "-f", f"sft_dist.train {run.path}$")
    lab.eventually(lambda: len(read_jsonl(run.attempts)) == 4, 60, job)
    assert "SIGKILL" in read_jsonl(run.attempts)[-1]["reason"]
    reached = read_jsonl(run.attempts)[-1]["last_step"]
    lab.eventually(state(run, "running"), PATIENCE, job)
    lab.eventually(past_step(run, reached), PATIENCE, job)
    assert lab.job(job)["Restarts"] == "0", "the job has kept its nodes"
    lab.run("scancel", "--signal=USR1", job)
    lab.wait_for(job, "FAILED", patience=PATIENCE)

    rows = read_jsonl(run.attempts)
    assert [row["decided"] for row in rows] == [
        "over: it was cancelled",
        "requeue 1 of 1: time limit",
        "over: time limit, requeued 1 times already",
        "again in this job: unknown",
        "over: it was cancelled",
    ]
    assert rows[3]["failure"]["rank"] is not None
    assert [row["first_step"] for row in rows[1:4]] == [row["last_step"] for row in rows[:3]]


def test_a_wrong_config_ends_once_everywhere(lab: Lab, submit: Submit) -> None:
    run, job = submit("bad", "smoke", *TWO_BY_TWO, *PLAIN, "run.name=bad", "slurm.extra={hold: true}")
    text = run.config.read_text()
    run.config.write_text(text.replace("num_processes: 2", "num_processes: 3"))
    lab.run("scontrol", "release", job)
    began = time.monotonic()
    lab.wait_for(job, "FAILED", patience=60)
    assert time.monotonic() - began < 60
    assert decisions(run) == ["over: config, which another attempt does not change"]
    assert "6 processes" in run.read_status()["reason"]


def test_the_dry_runs_script_is_one_that_sbatch_takes(lab: Lab, run_cli: RunCli, tmp_path: Path) -> None:
    words = (*TWO_BY_TWO, "slurm.gpus_per_node=0", "slurm.extra={comment: \"a $(touch pwned) 'b'\"}")
    done = run_cli("submit", "smoke", *words, "--dry-run", env=ENV)
    assert done.returncode == 0, done.stderr
    (tmp_path / "job.sh").write_text(done.stdout)
    lab.run("sbatch", "--test-only", "job.sh")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "pwned").exists()


def test_an_array_is_a_run_for_each_value(lab: Lab, submit: Submit, tmp_path: Path) -> None:
    cpu = ("parallel.plan=cpu", "slurm.time=10", "run.name=sweep", "--array", "train.learning_rate=1e-3,2e-3")
    _, job = submit("sweep", "smoke", *PLAIN, *cpu)
    runs = [RunDir(tmp_path / "runs" / f"sweep-learning_rate-{rate}") for rate in ("0.001", "0.002")]
    lab.eventually(lambda: all(state(run, "done", "failed")() for run in runs), PATIENCE)
    assert [run.read_status()["state"] for run in runs] == ["done", "done"]
    assert job.endswith("_1")
    jobs: list[dict[str, Any]] = [json.loads((run.path / "slurm" / "job.json").read_text())["jobs"][0] for run in runs]
    assert [entry["job_id"] for entry in jobs] == [job.replace("_1", "_0"), job]
    assert all(Path(entry["stderr"]).is_file() for entry in jobs)


def test_a_chain_asks_trains_and_asks_in_three_jobs(use_lab: StartLab, submit: Submit) -> None:
    """On a cluster without accounting."""
    lab = use_lab("--no-accounting")
    run, job = submit("links", "smoke", *TWO_BY_TWO, "parallel.num_processes=1", "run.name=links", "--chain")
    lab.wait_for(job, patience=PATIENCE)
    assert run.read_status()["state"] == "done"
    assert decisions(run) == ["next job", "next job", "done"]
    assert [len(row["nodes"]) for row in read_jsonl(run.attempts)] == [1, 2, 1]
    assert (run.eval / "after.jsonl").is_file()
    assert run.report.is_file()


def test_no_slurm_is_needed_for_a_local_job(run_cli: RunCli, tmp_path: Path) -> None:
    words = ("parallel.plan=ddp", "parallel.num_processes=2", "slurm.time=10", "run.name=near", "--local", "--wait")
    done = run_cli("submit", "smoke", *PLAIN, *words, env=ENV)
    assert done.returncode == 0, done.stderr
    assert RunDir(tmp_path / "runs" / "near").read_status()["state"] == "done"
