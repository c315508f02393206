"""The batch script: what it says, and that no value is read as shell. Run by a real bash; needs submitit, no SLURM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.jobs.script import marker_text, sbatch_options, script_text, setup_lines

pytest.importorskip("submitit")

Ended = Callable[..., "str | None"]

HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "$HOME",
    "\u00fc \u4f60",
    "a\\b",
    "*",
]


def config(run: str = "demo", **slurm: Any) -> Config:
    return Config.model_validate({"run": {"name": run}, "slurm": slurm})


def script(folder: Path, **slurm: Any) -> str:
    return script_text(sbatch_options(config(**slurm), folder), folder, "python")


def sbatch_lines(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_what_is_asked_for_is_in_the_script(tmp_path: Path) -> None:
    text = script(
        tmp_path,
        partition="a,b",
        nodes=2,
        gpus_per_node="h100:8",
        time="1-00:30:00",
        mem="64G",
        extra={"mail-type": "END"},
    )
    lines = sbatch_lines(text)
    assert {"partition=a,b", "nodes=2", "gpus-per-node=h100:8", "time=1470", "mem=64G", "mail-type=END"} <= set(lines)
    assert {"ntasks-per-node=1", "signal=USR2@120", "requeue", "job-name=demo"} <= set(lines)
    assert "--kill-on-bad-exit=1" in text
    assert "--wait=" in text


def test_no_requeue_if_none_is_wanted(tmp_path: Path) -> None:
    assert "no-requeue" in sbatch_lines(script(tmp_path, max_requeues=0))


def test_false_leaves_an_option_of_the_profile_out(tmp_path: Path) -> None:
    """It became --exclusive=False, which sbatch refuses."""
    assert not [it for it in sbatch_lines(script(tmp_path, extra={"exclusive": False})) if it.startswith("exclusive")]
    assert "exclusive" in sbatch_lines(script(tmp_path, extra={"exclusive": True}))


def test_gres_stands_alone(tmp_path: Path) -> None:
    lines = sbatch_lines(script(tmp_path, extra={"gres": "gpu:2"}))
    assert "gres=gpu:2" in lines
    assert not [it for it in lines if it.startswith("gpus-per-node")]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_reaches_the_job_unread(value: str, tmp_path: Path) -> None:
    slurm = config(env={"PROBE": value}, modules=(value,), socket_ifname=value).slurm
    probe = [
        "module() { printf '%s\\0' \"$2\"; }",
        *setup_lines(slurm),
        'printf "%s\\0" "$PROBE" "$NCCL_SOCKET_IFNAME"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(probe)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:3] == [value] * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_option_stays_one_line(value: str, tmp_path: Path) -> None:
    text = script(tmp_path, constraint=value, extra={"comment": value})
    assert len([line for line in sbatch_lines(text) if line.startswith(("constraint", "comment"))]) == 2


@pytest.mark.parametrize("name", ["a%j", "a\\b", "a'b", "a\nb"])
def test_folders_that_sbatch_misreads_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        script(tmp_path / name)


@pytest.fixture
def ended(tmp_path: Path) -> Ended:
    """`ended(folder, rc, script, **env)`: what scontrol was asked for by the script of a job whose srun ends with `rc`.

    srun, scontrol and sleep are stand-ins; `script` is what scontrol does. None if it was not called.
    """

    def run(folder: Path, rc: int, scontrol: str = ":", slurm: Any = None, **env: str) -> str | None:
        tools, asked = tmp_path / "bin", tmp_path / "asked"
        tools.mkdir()
        scripts = {"srun": f"exit {rc}", "scontrol": f"echo \"$@\" >> '{asked}'\n{scontrol}", "sleep": ":"}
        for name, text in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        job = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", **env}
        text = script(folder, **(slurm or {}))
        assert subprocess.run(["bash", "-c", text], env={**os.environ, **job}, check=False).returncode == rc
        return asked.read_text() if asked.exists() else None

    return run


@pytest.mark.parametrize(
    ("exclude", "cancelled", "asked_for"),
    [
        ("", False, "requeue 7\n"),
        (None, False, None),
        ("", True, None),
        ("n2,gpu[1-3]", False, "requeue 7\nupdate JobId=7 ExcNodeList=n2,gpu[1-3]\n"),
        ("n2", True, None),
        ("$(touch pwned) `touch pwned`", False, "requeue 7\n"),
        ("n2\n/other", False, "requeue 7\n"),
    ],
)
def test_the_script_requeues_by_the_marker(
    tmp_path: Path, ended: Ended, exclude: str | None, cancelled: bool, asked_for: str | None
) -> None:
    """The stand-in for scontrol ends the script as SLURM does; the folder's name has a space."""
    folder, run = tmp_path / "a b", tmp_path / "my run"
    for each in (folder, run):
        each.mkdir()
    end = "kill -TERM $PPID" if exclude and asked_for and "Exc" in asked_for else ":"
    if exclude is not None:
        (folder / "requeue.7.1").write_text(marker_text(str(run), exclude))
    if cancelled:
        (run / ".cancelled").touch()
    assert ended(folder, 3, end) == asked_for
    assert not list(tmp_path.rglob("pwned"))


def test_only_its_own_task_of_an_array_is_requeued(tmp_path: Path, ended: Ended) -> None:
    """The last task has the number of the array: `scontrol requeue 7` would end the others, too, and start those again
    that are done."""
    (tmp_path / "requeue.7.1").write_text(marker_text(str(tmp_path), "n2"))
    asked = ended(tmp_path, 3, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert asked == "requeue 7_2\nupdate JobId=7_2 ExcNodeList=n2\n"


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path: Path, ended: Ended) -> None:
    (tmp_path / "requeue.7.1").write_text(marker_text(str(tmp_path)))
    answer = f"[ $(grep -c requeue '{tmp_path}/asked') = 3 ]"
    assert ended(tmp_path, 3, answer) == "requeue 7\nshow job 7\n" * 2 + "requeue 7\n"


@pytest.mark.parametrize(("restarts", "asked"), [(1, 4), (2, 1), (11, 1)])
def test_a_job_that_slurm_has_requeued_by_itself_is_left_alone(
    tmp_path: Path, ended: Ended, restarts: int, asked: int
) -> None:
    """Its script may outlive the node's daemon, and the job is at work elsewhere when that asks for the second time."""
    (tmp_path / "requeue.7.1").write_text(marker_text(str(tmp_path), "n2"))
    answer = f'[ "$1" = show ] && echo "   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0"; [ "$1" = update ]'
    said = ended(tmp_path, 3, answer) or ""
    assert said.count("requeue 7\n") == asked
    assert ("update JobId=7" in said) == (restarts == 1)


@pytest.mark.parametrize(
    ("rc", "begun", "slurm", "requeued"),
    [
        (143, False, {}, True),
        (15, False, {}, True),
        (140, False, {}, True),
        (143, True, {}, False),
        (1, False, {}, False),
        (143, False, {"max_requeues": 1}, False),
        (143, False, {"max_requeues": 0}, False),
    ],
)
def test_a_job_that_was_preempted_before_it_could_hear_it_is_requeued(
    tmp_path: Path, ended: Ended, rc: int, begun: bool, slurm: Any, requeued: bool
) -> None:
    if begun:
        (tmp_path / "requeue.7.1.begun").touch()
    assert ended(tmp_path, rc, slurm=slurm) == ("requeue 7\n" if requeued else None)


@pytest.mark.parametrize(
    ("rc", "begun", "cancelled", "slurm", "requeued"),
    [
        (9, "run", False, {}, True),
        (137, "run", False, {}, True),
        (9, "run", True, {}, False),
        (9, "", False, {}, False),
        (9, None, False, {}, False),
        (1, "run", False, {}, False),
        (9, "run", False, {"max_requeues": 1}, False),
        (9, "run", False, {"max_requeues": 0}, False),
    ],
)
def test_a_job_whose_task_was_killed_before_it_decided_is_requeued(
    tmp_path: Path, ended: Ended, rc: int, begun: str | None, cancelled: bool, slurm: Any, requeued: bool
) -> None:
    """Srun's status is that of the task that was killed; once the task has decided, its file names no run."""
    folder, run = tmp_path / "a b", tmp_path / "my run"
    for each in (folder, run):
        each.mkdir()
    if begun is not None:
        (folder / "requeue.7.1.begun").write_text(f"{run if begun else ''}\n")
    if cancelled:
        (run / ".cancelled").touch()
    assert ended(folder, rc, slurm=slurm) == ("requeue 7\n" if requeued else None)


def test_setup_that_fails_ends_the_job(tmp_path: Path) -> None:
    lines = setup_lines(config(setup=("false",)).slurm)
    done = subprocess.run(
        ["bash", "-c", "\n".join([*lines, "echo went on"])], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_a_dependency_of_the_users_stands_beside_that_of_a_chain(tmp_path: Path) -> None:
    options = sbatch_options(config(extra={"dependency": "singleton"}), tmp_path, after=["7", "8"])
    assert options["additional_parameters"]["dependency"] == "afterok:7:8,singleton"
    assert sbatch_options(config(), tmp_path, after=["7"])["additional_parameters"]["dependency"] == "afterok:7"


def test_tasks_get_what_the_script_sets_also_after_export_none() -> None:
    done = subprocess.run(
        ["bash", "-c", "\n".join([*setup_lines(config().slurm), "env"])],
        env={"PATH": os.environ["PATH"], "SLURM_EXPORT_ENV": "NONE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "SLURM_EXPORT_ENV=ALL" in done.stdout.splitlines()
