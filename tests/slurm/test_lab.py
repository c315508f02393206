"""slurm/lab: what it promises to its users, and what the other SLURM tests rely on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.slurm.conftest import Lab, Manage, NewLab

pytestmark = pytest.mark.slurm

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def processes_of(lab: Lab) -> list[str]:
    """Every process that names the lab's folder in its command line or environment."""
    mark = str(lab.folder).encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                # The guard that takes the lab down after a killed pytest is the tests' own.
                if mark in words + (entry / "environ").read_bytes() and b"pidfd_open" not in words:
                    found.append(f"{entry.name} {words!r}")
    return found


def daemons(lab: Lab) -> dict[str, int]:
    return {name: int(pid) for name, pid in re.findall(r"^(\S+) +process (\d+)$", lab.manage("status").stdout, re.M)}


def test_up_on_a_running_lab_says_so_and_changes_nothing(lab: Lab) -> None:
    before = daemons(lab)
    assert set(before) == {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd.n1", "slurmd.n2"}
    again = lab.manage("up")
    assert (again.returncode, again.stdout) == (0, lab.manage("status", "--env").stdout)
    assert "is up already" in again.stderr
    assert daemons(lab) == before


def test_up_refuses_other_options_than_the_lab_was_made_with(lab: Lab) -> None:
    refused = lab.manage("up", "--nodes", "3", "--gpus", "2")
    assert refused.returncode == 1
    assert "was made with nodes 2; take it down first" in refused.stderr


def test_the_exports_point_a_bash_at_the_lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CONF")
    script = 'eval "$1" && sinfo --noheader --format=%R'
    words = ["bash", "-c", script, "bash", lab.manage("status", "--env").stdout]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["high", "main", "short"]


def test_a_job_sees_two_nodes_with_names_and_gpus(each_lab: Lab) -> None:
    show = "echo node=$SLURMD_NODENAME host=$(hostname) rank=$SLURM_PROCID gpus=$CUDA_VISIBLE_DEVICES"
    job = each_lab.submit(f"srun bash -c '{show}'; getent hosts $(hostname)", "--nodes=2", "--gpus-per-node=2")
    each_lab.wait_for(job)
    first, second = each_lab.nodes
    lines = each_lab.output(job).splitlines()
    assert sorted(lines[:2], key=lambda line: "rank=1" in line) == [
        f"node={first} host={first} rank=0 gpus=0,1",
        f"node={second} host={second} rank=1 gpus=0,1",
    ]
    # Nodes know each other's names, though the machine's own /etc/hosts does not.
    assert lines[2].split() == ["127.0.0.11", first]
    assert first not in Path("/etc/hosts").read_text(encoding="utf-8").split()


def test_signals_reach_what_the_proctrack_plugin_lets_them_reach(each_lab: Lab) -> None:
    # A worker in a session of its own, started by the task, as torchrun's are.
    worker = 'trap "echo worker got it" USR1; echo ready; while :; do sleep 0.1; done'
    task = f"trap 'echo task got it' USR1; setsid bash -c '{worker}' & while :; do sleep 0.1; done"
    Path("task.sh").write_text(task, encoding="utf-8")
    job = each_lab.submit("srun bash task.sh", "--nodes=1")
    each_lab.wait_for_output(job, "ready")
    each_lab.run("scancel", "--signal=USR1", job)
    each_lab.wait_for_output(job, "task got it")
    # The same signal, later: whoever was to get the first one has had the time.
    each_lab.run("scancel", "--signal=USR1", job)
    each_lab.eventually(lambda: each_lab.output(job).count("task got it") == 2, job=job)
    assert ("worker got it" in each_lab.output(job)) == ("cgroup" not in each_lab.options)


def test_a_preempted_job_is_warned_and_may_requeue_itself(each_lab: Lab) -> None:
    task = "trap 'echo warned; exit' TERM; echo ready; while :; do sleep 0.1; done"
    Path("task.sh").write_text(task, encoding="utf-8")
    requeue = "[ ${SLURM_RESTART_COUNT:-0} = 1 ] && exit; srun bash task.sh; scontrol requeue $SLURM_JOB_ID"
    low = each_lab.submit(requeue, "--nodes=2", "--exclusive")
    each_lab.eventually(lambda: each_lab.output(low).count("ready") == 2, job=low)
    high = each_lab.submit("true", "--nodes=2", "--exclusive", "--partition=high")
    each_lab.wait_for(high)
    each_lab.hurry(low)
    assert each_lab.wait_for(low)["Restarts"] == "1"
    assert each_lab.output(low).count("warned") == 2


def test_in_the_partition_short_a_job_is_preempted_and_requeued_without_a_warning(lab: Lab) -> None:
    low = lab.submit("[ ${SLURM_RESTART_COUNT:-0} = 1 ] || sleep 50", "--exclusive", "--nodes=2", "--partition=short")
    lab.wait_for(low, "RUNNING")
    high = lab.submit("true", "--nodes=2", "--exclusive", "--partition=high")
    lab.wait_for(high)
    lab.hurry(low)
    assert lab.wait_for(low)["Restarts"] == "1"


def test_accounting_answers_to_root_and_to_an_ordinary_user(lab: Lab) -> None:
    ours = lab.submit("true", "--account=lab")
    theirs = lab.run(*NOBODY, "sbatch", "--parsable", "--chdir=/", "--output=/dev/null", "--wrap=id -u")
    asked = ["sacct", "--noheader", "--parsable2", "-X", f"--jobs={ours},{theirs}", "--format=JobID,State,User"]
    answer = f"{ours}|COMPLETED|root\n{theirs}|COMPLETED|nobody"
    # slurmctld passes on what it knows every five seconds; until then records are incomplete or absent.
    lab.eventually(lambda: lab.run(*asked) == answer, job=theirs)
    assert lab.run(*NOBODY, *asked) == answer


def test_labs_do_not_meet_and_down_leaves_nothing(lab: Lab, new_lab: NewLab, tmp_path: Path) -> None:
    hosts = Path("/etc/hosts").read_bytes()
    with new_lab("--no-accounting", "--nodes=1", "--gpus=0") as other:
        # A process that left its session and cleared its environment belongs to its job all the same.
        escape = "(setsid env -i bash -c 'echo $$ >escaped; exec sleep 600' >/dev/null 2>&1 &); sleep 600"
        job = other.submit(escape, f"--chdir={tmp_path}")
        other.wait_for(job, "RUNNING")
        other.eventually(lambda: Path("escaped").exists() and Path("escaped").read_text() != "", job=job)
        escaped = int(Path("escaped").read_text())
        assert lab.run("squeue", "--noheader") == ""
        assert abs(int(job) - int(lab.submit("true"))) >= 1000
        os.kill(daemons(other)["slurmd.n1"], signal.SIGKILL)
        broken = other.manage("status")
        assert broken.returncode == 1
        assert re.search("slurmd.n1 +not running", broken.stdout)
        assert other.manage("up").returncode == 0
        assert other.job(job)["JobState"] == "RUNNING"
        assert processes_of(other)

        assert other.manage("down").returncode == 0
        assert processes_of(other) == []
        assert not Path(f"/proc/{escaped}/exe").exists()
        assert not other.folder.exists()
        assert other.manage("down").returncode == 0
    assert "idle" in lab.run("sinfo", "--noheader", "--format=%T")
    assert Path("/etc/hosts").read_bytes() == hosts


def test_labs_that_start_at_the_same_moment_do_not_meet(new_lab: NewLab) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        labs = list(pool.map(stack.enter_context, [new_lab("--nodes=1", "--gpus=0") for _ in range(2)]))
        asked = ("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=Cluster")
        clusters = [lab.run(*asked) for lab in labs]
        assert clusters == [lab.run("scontrol", "show", "config").split("ClusterName")[1].split()[1] for lab in labs]
        assert clusters[0] != clusters[1]
        for lab in labs:
            # MariaDB's temporary files have names that two can have in common, so that the later one ended.
            files = [file.readlink() for file in Path(f"/proc/{daemons(lab)['mariadbd']}/fd").iterdir()]
            kept = [file for file in files if file.is_relative_to(lab.folder.parent)]
            assert kept
            assert all(file.is_relative_to(lab.folder) for file in kept), kept


def test_a_kept_lab_goes_on_where_it_was(new_lab: NewLab) -> None:
    with new_lab("--no-accounting", "--nodes=1", "--gpus=0") as other:
        job = other.submit("sleep 600")
        other.wait_for(job, "RUNNING")
        assert other.manage("down", "--keep").returncode == 0
        assert processes_of(other) == []
        assert "SlurmctldHost" in (other.folder / "slurm.conf").read_text(encoding="utf-8")
        assert other.manage("up").returncode == 0
        assert other.job(job)["JobState"] == "CANCELLED"


def test_nothing_is_done_in_a_folder_that_is_no_lab(manage: Manage, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    taken = manage(tmp_path, "up")
    assert taken.returncode == 1
    assert "--dir" in taken.stderr
    absent = manage(tmp_path, "down")
    assert (absent.returncode, "there is no lab" in absent.stderr) == (0, True)
    shown = manage(tmp_path, "status", "--env")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_commands_say_what_they_can_do(manage: Manage, tmp_path: Path) -> None:
    for command in ("up", "down", "status"):
        done = manage(tmp_path, command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: slurm/lab/{command}")
