"""What the kernel lets us know: kills for memory in both versions of cgroups, and its log where it may be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.jobs import evidence
from sft_dist.jobs.evidence import ask_past
from sft_dist.jobs.host_signs import kernel_lines, oom_kills
from sft_dist.jobs.queue import Said

JOB = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"


def counted(folder: Path, name: str, kills: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")


def own(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(f"9:name=systemd:/\n{line}\n")
    return path


def test_version_2_counts_in_the_own_cgroup_or_the_jobs(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    here = root / JOB.lstrip("/")
    counted(here, "memory.events", 1)
    counted(here.parents[2], "memory.events", 2)
    counted(root / "system.slice", "memory.events", 9)  # other jobs', too
    assert oom_kills(own(tmp_path, f"0::{JOB}"), root) == 2


def test_version_1_counts_where_the_limit_was_met(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    counted(root / "memory" / "slurm" / "uid_1" / "job_7" / "step_0", "memory.oom_control", 3)
    counted(root / "memory" / "slurm" / "uid_1", "memory.oom_control", 8)
    assert oom_kills(own(tmp_path, "4:memory:/slurm/uid_1/job_7/step_0/task_0"), root) == 3


def test_outside_of_a_job_only_the_own_cgroup_counts(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    counted(root / "user.slice", "memory.events", 9)
    assert oom_kills(own(tmp_path, "0::/user.slice/session"), root) == 0
    assert oom_kills(tmp_path / "none", root) == 0
    assert oom_kills() >= 0


def test_the_kernels_lines_are_read_where_they_may_be(tmp_path: Path) -> None:
    assert kernel_lines(0.0, tmp_path / "none") == ()
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("4,1,5000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.\n")
    assert kernel_lines(4.0, kmsg) == ("NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.",)
    assert kernel_lines(6.0, kmsg) == ()
    kmsg.write_text("4,1,5000000,-;usb 1-1: new device\n")
    assert kernel_lines(0.0, kmsg) == ()


@pytest.mark.parametrize(
    ("listed", "state", "by"),
    [
        ("NODE_FAIL|1:0|None\nRUNNING|0:0|None\n", "NODE_FAIL", ""),
        ("CANCELLED by 1000|0:15|None\n", "CANCELLED", "1000"),
        ("TIMEOUT|0:0|None\nPREEMPTED|0:0|None\nPENDING|0:0|Priority\n", "PREEMPTED", ""),
        ("RUNNING|0:0|None\n", None, ""),
        ("sacct: error: Slurm accounting storage is disabled\n", None, ""),
    ],
)
def test_accounting_knows_how_the_start_before_ended(
    listed: str, state: str | None, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "call", lambda _: Said(listed))
    found = ask_past("7")
    assert (found and found.state, found.by if found else "") == (state, by)
