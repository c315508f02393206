"""What state a run is in: its folder held against locks, queue and accounting; one bad run does not hide the others."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import append_jsonl, write_json
from sft_dist.jobs.queue import Job, Queue
from sft_dist.jobs.records import Submitted, find_runs, last_rows, read_record, submitted_jobs
from sft_dist.jobs.status import RunStatus, gpu_hours, look, seconds_a_step
from sft_dist.jobs.verdict import Verdict, jobs_of, verdict
from sft_dist.rundir import RunDir
from tests.conftest import RunCli

HERE = socket.gethostname()
NOW = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)


def ago(seconds: float) -> datetime.datetime:
    return NOW - datetime.timedelta(seconds=seconds)


def made(name: str, status: dict[str, Any] | None = None, **files: Any) -> RunDir:
    """A run with status.json as given (heard of an hour ago), slurm/job.json from `job`, .lock from `host`."""
    run = RunDir(Path("runs") / name)
    run.path.mkdir(parents=True)
    run.config.write_text("run: {}\n", encoding="utf-8")
    write_json(
        run.status, {"step": 5, "max_steps": 10, "attempt": 1, "updated": ago(3600).isoformat(), **(status or {})}
    )
    if "job" in files:
        write_json(run.path / "slurm" / "job.json", files["job"])
    if "host" in files:
        run.lock.write_text(f"process 4194304 on {files['host']}\n", encoding="utf-8")
    return run


def judged(run: RunDir, *jobs: Job, known: bool = True, now: datetime.datetime = NOW) -> Verdict:
    record = read_record(run)
    return verdict(record, jobs_of(record), Queue({job.id: job for job in jobs}, known=known), here=HERE, now=now)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`slurm(squeue="...", sacct="...")` puts commands that print these lines on the PATH; returns the file of calls."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "/nowhere")

    def make(**printed: str) -> Path:
        for name, text in printed.items():
            (folder / name).write_text(
                f'#!/bin/sh\necho "{name} $*" >> {calls}\ncat <<"E"\n{text}\nE\n', encoding="utf-8"
            )
            (folder / name).chmod(stat.S_IRWXU)
        return calls

    return make


# --- the state -------------------------------------------------------------------------------------------------------


def test_a_process_that_holds_the_run_makes_it_running() -> None:
    run = made("a", {"state": "running"}, host=HERE)
    assert judged(run).state == "lost"
    with run.locked():
        found = judged(run)
        assert (found.state, found.live) == ("running", True)
        run.cancelled.touch()
        assert judged(run).why == "stopping"
    assert judged(run) == Verdict("lost", f"process {os.getpid()} on this host ended without a word")


def test_a_lock_of_another_host_says_nothing() -> None:
    found = judged(made("a", {"state": "running"}, host="elsewhere"), known=False)
    assert (found.state, found.why) == ("running", "on elsewhere, which cannot be seen from here")


JOB = {"job_id": "12", "nodes": 2, "gpus_per_node": 8}


@pytest.mark.parametrize("said", ["running", "queued", "stopped"])
@pytest.mark.parametrize("known_by", [{"run": "{}"}, {"stdout": "{}/slurm/12_0_log.out"}])
def test_a_copy_of_a_run_has_none_of_its_jobs(said: str, known_by: dict[str, str]) -> None:
    """`cancel` of the copy ended the job of the run itself."""
    folder = str(Path("runs/a").absolute())
    entry = {**JOB, **{key: value.format(folder) for key, value in known_by.items()}}
    original = made("a", {"state": said}, job={"jobs": [entry]})
    append_jsonl(original.attempts, {"attempt": 1, "job_id": "12"})
    shutil.copytree(original.path, "runs/b")
    job = Job("12", "RUNNING", start=ago(10))
    assert judged(original, job).live
    found = judged(RunDir(Path("runs/b")), job)
    assert (found.state, found.live) == ("stopped" if said == "stopped" else "lost", False)
    assert said == "stopped" or found.why == f"a copy: job 12 works on {folder}"
    original.path.rename("runs/c")
    assert judged(RunDir(Path("runs/c")), job).live, "a run that was moved keeps its job"


@pytest.mark.parametrize(
    ("said", "job", "state", "why"),
    [
        ("running", Job("12", "RUNNING", start=ago(7200)), "running", ""),
        ("running", Job("12", "SUSPENDED", start=ago(7200)), "running", "suspended"),
        ("running", Job("12", "PENDING", reason="BeginTime"), "queued", "BeginTime"),
        ("running", Job("12", "TIMEOUT", end=ago(3500)), "lost", "job 12 ended: TIMEOUT"),
        ("running", Job("12", "TIMEOUT", end=ago(7200)), "running", "where cannot be seen from here"),
        ("running", None, "lost", "job 12 is not in the queue any more"),
        ("queued", Job("12", "PENDING", reason="Priority"), "queued", "Priority"),
        ("queued", Job("12", "SPECIAL_EXIT"), "queued", "Special_exit"),
        ("queued", Job("12", "CONFIGURING", start=ago(10)), "running", "starting"),
        ("queued", Job("12", "RUNNING", start=ago(7200)), "queued", "because"),
        ("queued", Job("12", "CANCELLED", end=ago(10)), "stopped", "job 12 was cancelled"),
        ("queued", Job("12", "BOOT_FAIL", end=ago(10)), "lost", "job 12 ended: BOOT_FAIL (a node went down)"),
        ("queued", None, "lost", "job 12 is not in the queue any more"),
        ("stopped", Job("12", "PENDING", reason="BeginTime"), "queued", "BeginTime"),
        ("stopped", Job("12", "RUNNING", start=ago(10)), "running", "starting"),
        ("stopped", Job("12", "RUNNING", start=ago(7200)), "stopped", "because"),
        ("stopped", Job("12", "COMPLETING", start=ago(7200)), "stopped", "because"),
        ("stopped", None, "stopped", "because"),
        ("failed", Job("12", "PENDING", reason="Resources"), "queued", "Resources"),
        ("failed", Job("12", "FAILED"), "failed", "because"),
        ("done", Job("12", "PENDING", reason="Dependency"), "done", "because"),
        ("done", None, "done", "because"),
    ],
)
def test_the_queue_has_a_say(said: str, job: Job | None, state: str, why: str) -> None:
    run = made("a", {"state": said, "reason": "because"}, job=JOB)
    found = judged(run, *([job] if job else []))
    assert (found.state, found.why) == (state, why)


def test_a_local_job_of_submitit_is_a_process_like_any_other() -> None:
    run = made("a", {"state": "running"}, job={"job_id": "12", "cluster": "local"}, host=HERE)
    assert jobs_of(read_record(run)) == ()
    assert judged(run).state == "lost"


def test_without_a_queue_the_run_is_taken_at_its_word() -> None:
    for said in ("running", "queued", "stopped", "failed", "done"):
        assert judged(made(said, {"state": said}, job=JOB), known=False).state == said


def test_a_run_that_was_heard_of_just_now_is_not_lost() -> None:
    run = made("a", {"state": "running", "updated": ago(5).isoformat()}, job=JOB)
    assert judged(run).state == "running"
    assert judged(run, now=NOW + datetime.timedelta(minutes=2)).state == "lost"


def test_of_several_jobs_the_one_that_runs_counts() -> None:
    run = made("a", {"state": "queued"}, job={"jobs": [{"job_id": 1}, {"job_id": 2}, {"job_id": 3}]})
    waits = Job("3", "PENDING", reason="Dependency")
    assert judged(run, Job("1", "COMPLETED"), Job("2", "RUNNING"), waits).job == Job("2", "RUNNING")
    assert judged(run, Job("1", "COMPLETED"), Job("2", "TIMEOUT"), waits).why == "Dependency"
    assert judged(run, Job("1", "RUNNING")).state == "running"
    assert judged(run, Job("1", "COMPLETED")).state == "lost"  # the newest is what it waits for


def test_the_same_number_on_another_cluster_is_another_job(
    slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = slurm(squeue="12|PENDING|N/A|N/A|1|Priority")
    (tmp_path / "slurm.conf").write_text("ClusterName=here\n", encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    run = made("a", {"state": "running"}, job={**JOB, "cluster": "there"})
    assert look([run])[0][0].state == "running"
    assert not calls.exists()
    write_json(run.path / "slurm" / "job.json", {**JOB, "cluster": "HERE"})
    assert look([run])[0][0].state == "queued"


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"job_id": "12"}, ["12"]),
        ({"job_id": 12, "array_task": 3}, ["12_3"]),
        ({"job_id": "12_3", "array_task": 3}, ["12_3"]),
        ({"jobs": [{"job_id": "1"}, None, {"job_id": "x"}, {"job_id": "--help"}, {"job_id": "2"}]}, ["1", "2"]),
        ([{"job_id": "1"}], ["1"]),
        (None, []),
        ("12", []),
        ({"jobs": "12"}, []),
        ({}, []),
    ],
)
def test_job_json_is_read_without_trust(content: Any, ids: list[str]) -> None:
    assert [job.id for job in submitted_jobs(content)] == ids


def test_the_last_rows_are_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_rows(path) == ()
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + b'{"step": 2, "eval_loss": 1}\n' * 5000 + b'{"step": 3, "lo')
    assert [row for row in last_rows(path) if "loss" in row] == []  # beyond the last MAX_ROWS
    path.write_bytes(b"x" * 5_000_000 + b'\n{"step": 7, "loss": 1.5}\n' + b"y" * 70_000)
    assert last_rows(path) == ({"step": 7, "loss": 1.5},)


def rows(*times: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"time": (NOW + datetime.timedelta(seconds=second)).isoformat(), "step": step} for second, step in times]


def test_the_pace_leaves_out_pauses() -> None:
    assert seconds_a_step(rows((0, 0), (20, 10), (40, 20))) == 2.0
    assert seconds_a_step(rows((0, 0), (20, 10), (9999, 20), (10019, 30), (10039, 40))) == 2.0
    assert seconds_a_step(rows((0, 10), (5, 5), (7, 6))) == 2.0  # taken back by a resume
    quick = [(step // 10, step) for step in range(1000)]  # ten steps a second, times of whole seconds
    assert seconds_a_step(rows(*quick)) == pytest.approx(0.1, rel=0.03)
    assert seconds_a_step(rows((0, 10))) is None
    assert seconds_a_step(rows((7, 1), (7, 2), (7, 3))) is None, "within one second"
    assert seconds_a_step([{"time": "soon", "step": 1}, {"time": 5, "step": "x"}, {}]) is None


def test_gpu_hours_count_attempts_and_the_one_under_way() -> None:
    run = made("a", {"state": "running"}, job=JOB)
    write_json(run.env, {"resolved": {"use_cpu": False, "world_size": 2}})
    for start, end, extra in (
        (7200, 3600, {"job_id": "12"}),  # 16 of the job
        (3600, 1800, {"gpus": 4}),
        (1800, 900, {}),  # by hand: 2 of env.json
        (900, None, {}),
    ):
        end_time = None if end is None else ago(end).isoformat()
        append_jsonl(run.attempts, {"start": ago(start).isoformat(), "end": end_time, **extra})
    record = read_record(run)
    assert gpu_hours(record, record.jobs, None, None) == 16 + 2 + 0.5
    assert gpu_hours(record, record.jobs, NOW, ago(450), "12") == 18.5 + 2
    assert gpu_hours(record, record.jobs, NOW, ago(9999), "12") == 18.5 + 4  # a job may hold several attempts
    assert gpu_hours(read_record(made("b")), (), NOW, ago(10)) is None
    assert gpu_hours(read_record(made("c")), (Submitted("1", gpus=1),), NOW, ago(3600), "1") == 1.0


# --- all runs --------------------------------------------------------------------------------------------------------


def test_all_runs_take_one_squeue_and_one_sacct(slurm: Callable[..., Path]) -> None:
    calls = slurm(
        squeue="1|PENDING|2026-11-23T00:00:00|N/A|4|Priority\n2|RUNNING|2026-11-22T10:00:00|N/A|2|None",
        sacct="3|TIMEOUT|2026-11-22T09:00:00|2026-11-22T11:30:00|1",
    )
    made("waits", {"state": "queued"}, job={"job_id": "1"})
    made("runs", {"state": "running"}, job={"job_id": "2"})
    made("gone", {"state": "running"}, job={"job_id": "3"})
    made("failed-old", {"state": "failed", "updated": ago(9999).isoformat()}, job={"job_id": "4"})
    made("failed-new", {"state": "failed"})
    made("done", {"state": "done"}, job={"job_id": "5"})
    statuses, notes = look(find_runs(Path("runs")))
    assert [(it.name, it.state) for it in statuses] == [
        ("runs", "running"), ("waits", "queued"), ("gone", "lost"),
        ("failed-new", "failed"), ("failed-old", "failed"), ("done", "done"),
    ]  # fmt: skip
    assert not notes
    assert [line.rpartition("=")[2] for line in calls.read_text(encoding="utf-8").splitlines()] == ["1,2,3,4", "3"]
    assert [line.split()[0] for line in calls.read_text(encoding="utf-8").splitlines()] == ["squeue", "sacct"]


@pytest.mark.parametrize("state", ["running", "failed", "stopped"])
def test_the_last_log_event_may_know_a_later_step(slurm: Callable[..., Path], state: str) -> None:
    """status.json names a step every five seconds, and none at all when its process is killed."""
    slurm()
    run = made("killed", {"state": state})
    append_jsonl(run.metrics, {"step": 9, "loss": 0.25})
    assert look([run])[0][0].step == 9
    append_jsonl(run.metrics, {"step": 3, "loss": 0.25})
    assert look([run])[0][0].step == 5


def test_one_bad_run_does_not_hide_the_others(slurm: Callable[..., Path], run_cli: RunCli, ask_cli: RunCli) -> None:
    slurm(squeue="")
    good = made("good", {"state": "done"})
    append_jsonl(good.metrics, {"step": 9, "loss": 0.25})
    made("half").status.write_text('{"state": "runn', encoding="utf-8")
    made("empty").status.write_text("", encoding="utf-8")
    made("list").status.write_text("[1]", encoding="utf-8")
    made("none").status.unlink()
    folder = made("folder")
    folder.status.unlink()
    folder.status.mkdir()
    made("loop", {"state": "done"}).attempts.symlink_to("attempts.jsonl")
    made("deep", {"state": "done"}).metrics.write_text("[" * 100_000 + "\n", encoding="utf-8")
    made("types", {"state": ["x"], "step": "5", "max_steps": -1, "attempt": 10**30, "updated": 7, "reason": {"a": 1}})
    huge = made("numbers", {"state": "done", "updated": "9999-12-31T23:59:59+00:00", "checkpoint": ["x"]})
    huge.metrics.write_text('{"step": 1, "loss": 1' + "0" * 400 + "}\n", encoding="utf-8")
    made("binary", {"state": "done"}).metrics.write_bytes(bytes(range(256)) * 9)
    made("rows", {"state": "done"}).attempts.write_text('7\n"x"\n{"nodes": "n1", "gpus": []}\n{', encoding="utf-8")
    made("job", {"state": "running"}, job={"job_id": {"a": 1}}).env.write_text("7", encoding="utf-8")
    hostile = "\x1b[2J[red]\u202e\n" + "x" * 150
    made(hostile, {"state": "failed", "reason": "\x1b]0;t\x07[bold]boom[/bold]\n" + "y" * 5000})
    (Path("runs") / "no run").mkdir()
    done = run_cli("status")
    assert (done.returncode, done.stderr) == (0, "")
    for name in (
        "good",
        "half",
        "empty",
        "list",
        "none",
        "folder",
        "loop",
        "deep",
        "types",
        "numbers",
        "binary",
        "rows",
        "job",
    ):
        assert f"\n{name} " in done.stdout, name
    assert "<U+001B>[2J[red]<U+202E>" in done.stdout
    assert "no run" not in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert done.stdout.count("unknown") >= 5
    facts = json.loads(ask_cli("status", "--json").stdout)["runs"]
    assert {it["name"]: it["loss"] for it in facts}["good"] == 0.25
    for name in ("types", "rows", hostile, "loop", "deep"):
        one = ask_cli("status", Path("runs") / name)
        assert (one.returncode, one.stderr) == (0, ""), name
        assert "\x1b" not in one.stdout


def test_one_run_is_shown_with_its_attempts_and_what_to_type(slurm: Callable[..., Path], ask_cli: RunCli) -> None:
    slurm(squeue="12|PENDING|2099-01-01T00:00:00|N/A|2|Resources")
    run = made("demo", {"state": "stopped", "checkpoint": "checkpoint-5"}, job=JOB)
    line = {"attempt": 1, "start": ago(7200).isoformat(), "end": ago(3600).isoformat(), "job_id": "12"}
    append_jsonl(
        run.attempts,
        {**line, "first_step": 0, "last_step": 5, "ended": "stopped", "reason": "by SIGUSR2", "decided": "requeue"},
    )
    done = ask_cli("status", "demo")
    assert done.returncode == 0
    head, row = done.stdout.splitlines()[:2]
    assert head.split() == ["run", "state", "step", "loss", "left", "job", "nodes", "tries", "GPU", "h", "heard", "why"]
    assert row.split()[:9] == ["demo", "queued", "5/10", "-", "-", "12", "2", "1", "16.00"]
    assert "Resources; starts in about" in row
    for text in (
        "starts      2099-01-01 00:00:00 UTC",
        "checkpoint  checkpoint-5",
        "attempt     1  2026-11-22 10:00:00 UTC  1 h  job 12  steps 0 to 5  stopped  by SIGUSR2  requeue",
        "next        sft-dist cancel runs/demo",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("said", "job", "command"),
    [
        ("done", None, "sft-dist report runs/a"),
        ("stopped", None, "sft-dist resume runs/a"),
        ("failed", JOB, "sft-dist submit runs/a"),
        ("queued", None, "sft-dist resume runs/a"),
    ],
)
def test_what_to_type_next(said: str, job: Any, command: str) -> None:
    run = made("a", {"state": said}, **({"job": job} if job else {}))
    record = read_record(run)
    status = RunStatus(record, judged(run, known=False), record.jobs, Queue(), None, None, None)
    assert status.next_command == command


def test_folders_and_names_can_be_given(ask_cli: RunCli) -> None:
    for name in ("a", "b"):
        made(name, {"state": "done"})
    Path("runs").rename("elsewhere")
    made("c", {"state": "done"})

    def names(*words: str) -> list[str]:
        return [it["name"] for it in json.loads(ask_cli("status", "--json", *words).stdout)["runs"]]

    assert names() == ["c"]
    assert names("elsewhere") == ["a", "b"]
    assert names("elsewhere/a", "c", "elsewhere/a") == ["a", "c"]
    wrong = ask_cli("status", "d")
    assert wrong.returncode == 2
    assert "no run named 'd'" in wrong.stderr


def test_no_runs_is_no_error(ask_cli: RunCli) -> None:
    done = ask_cli("status")
    assert (done.returncode, done.stdout) == (0, "")
    assert "there are no runs in runs" in done.stderr
    assert json.loads(ask_cli("status", "--json").stdout) == {"runs": [], "notes": []}


def test_an_ill_slurm_is_a_note(slurm: Callable[..., Path], ask_cli: RunCli, tmp_path: Path) -> None:
    slurm(squeue="")
    (tmp_path / "bin" / "squeue").write_text(
        "#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n", encoding="utf-8"
    )
    slurm(sacct="")
    made("a", {"state": "running"}, job=JOB)
    done = ask_cli("status")
    assert done.returncode == 0
    assert done.stderr == "note: squeue: Unable to contact slurm controller\n"
    assert "running" in done.stdout


def test_the_last_failure_is_shown_with_its_evidence(ask_cli: RunCli) -> None:
    run = made("a", {"state": "failed", "reason": "the disk is full, on rank 3 (n2): free some"})
    found = {"kind": "disk", "sentence": "the disk is full", "evidence": "OSError: \x1b[31m[Errno 28]", "rank": 3}
    append_jsonl(run.attempts, {"attempt": 1, "ended": "failed", "failure": found, "decided": "over: disk"})
    shown = ask_cli("status", "a").stdout
    assert "the disk is full, on rank 3 (n2): free some" in " ".join(shown.split())
    assert "disk  rank 3  said: OSError:" in shown
    assert "\x1b[31m" not in shown
    for odd in (3, {"kind": ["x"], "rank": {}}, {}):
        append_jsonl(run.attempts, {"attempt": 2, "ended": "failed", "failure": odd})
        assert ask_cli("status", "a").returncode == 0


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_sees_names_and_reasons_and_goes_without_other_columns(
    ask_cli: RunCli, slurm: Callable[..., Path], width: int
) -> None:
    name = "sweep-of-learning-rates"
    job = {"job_id": "12345678", "cluster": "c"}
    made(name, {"state": "failed", "step": 12000, "max_steps": 120000, "reason": "out of memory"}, job=job)
    slurm(squeue="", sacct="")
    lines = ask_cli("status", env={"COLUMNS": str(width)}).stdout.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    titles = lines[0].split()
    assert [it for it in ("run", "state", "step", "left", "why") if it not in titles] == []
    assert "nodes" not in titles
    assert "12000/120000" in lines[1]
    begin, end = lines[0].index("run"), lines[0].index("state")
    assert "".join(line[begin:end].strip() for line in lines[1:]) == name
    assert "".join(line[lines[0].index("why") :].strip().replace(" ", "") for line in lines[1:]).startswith("outofmem")
