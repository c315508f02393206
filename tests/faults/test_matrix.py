"""The fault matrix: what is done to a run's processes, how the attempt ends, what is decided, and that nothing was lost.

A run meets one fault after the other, each in the attempt that goes on from the one before. In the end its losses, its
evaluations and its weights are those of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.config.loader import load_run_config, write_config
from sft_dist.files import read_jsonl
from sft_dist.jobs.decision import decide
from sft_dist.jobs.failures import Failure
from sft_dist.parallel.adopt import with_values
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import damage

if TYPE_CHECKING:
    from tests.faults.conftest import Life, MakeRun, Server

STEPS = 24
TWO = ("parallel.plan=ddp", "parallel.num_processes=2")
ONE = ("parallel.plan=cpu",)


@dataclass(frozen=True)
class Case:
    """A fault, and what is to follow."""

    faults: tuple[dict[str, Any], ...]
    ends: str
    """`stopped` or `failed` in attempts.jsonl; `done`; `lost` if nobody was left to say it, which the next attempt does."""
    kind: str = ""
    """Class of the failure."""
    reason: str = ""
    """A pattern that is in the reason."""
    comes_back: bool | None = None
    """Whether a job with this failure is requeued; None: there is nothing to decide."""
    saved: tuple[int, int] | None = None
    """Between which steps the newest complete checkpoint is afterwards; None if there is none."""
    code: int | None = None
    """Of the command, if it is not that of the state."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Set in the run's config for this attempt and those after it."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the command's environment."""


def at(point: str, action: str, rank: int | None = None, after: float = 0.0) -> dict[str, Any]:
    fault: dict[str, Any] = {"at": point, "do": action, "after": after}
    return fault if rank is None else {**fault, "rank": rank}


# A checkpoint counts at the end of its save: what ends a process later costs the steps since then, and in the save those since
# the one before.
OOM = "out_of_memory"
CASES: dict[str, Case] = {
    "signal while Python starts": Case(
        (at("start", "launcher SIGUSR2", 0), at("start", "sleep 1")), "stopped", "cancelled", "SIGUSR2", False
    ),
    "signal to one rank, data preparation": Case(
        (at("prepare", "SIGTERM", 1),), "stopped", "cancelled", "SIGTERM outside of the training", False
    ),
    "signal to one rank, model load": Case(
        (at("load", "SIGINT", 1),), "stopped", "cancelled", "SIGINT outside of the training", False
    ),
    "SIGKILL of a worker before step 1": Case(
        (at("load", "SIGKILL", 1), at("load", "sleep 20", 0)),
        *("failed", "unknown", "rank 1 .* was killed by SIGKILL", True),
    ),
    "error on one rank before it enters the run": Case(
        (at("join", "raise no such library", 1),), "failed", "unknown", "no such library", True
    ),
    "port taken": Case((at("command", "port"),), "failed", "network", "port", True),
    "signal to one rank": Case(
        (at("step:4", "SIGTERM", 1),), "stopped", "cancelled", "SIGTERM at step 4, saved as checkpoint-4", False, (4, 4)
    ),
    "signal during evaluation": Case(
        (at("evaluate:5", "SIGUSR1", 1),), "stopped", "cancelled", "SIGUSR1 at step 5", False, (5, 5)
    ),
    "signal to all with skew": Case(
        (at("step:7", "SIGTERM", 0), at("step:7", "SIGTERM", 1, after=0.4)),
        *("stopped", "cancelled", "SIGTERM at step 7", False, (7, 7)),
    ),
    "SIGABRT of a worker that leaves after a stop": Case(
        (at("step:8", "SIGTERM", 0), at("leave", "SIGABRT", 1)),
        *("stopped", "cancelled", "SIGTERM at step 8", False, (8, 8)),
    ),
    "signal during save": Case(
        (at("save:9", "SIGTERM"),), "stopped", "cancelled", "SIGTERM at step 10", False, (10, 10)
    ),
    "signal to every process": Case(
        (at("step:11", "everybody SIGINT", 0), at("save:11", "sleep 3")),
        *("stopped", "cancelled", "SIGINT at step 11", False, (11, 11)),
        variables={"PET_SHUTDOWN_TIMEOUT": "1"},
    ),
    "SIGKILL of a worker": Case(
        (at("forward:14", "SIGKILL", 1),), "failed", "unknown", "rank 1 .* was killed by SIGKILL", True, (12, 12)
    ),
    "SIGKILL of the launcher": Case((at("step:14", "launcher SIGKILL", 0),), "lost", "", "", None, (14, 17), code=-9),
    "SIGKILL during save": Case(
        (at("save:18", "SIGKILL", 0),), "failed", "unknown", "rank 0 .* was killed by SIGKILL", True, (14, 17)
    ),
    "exception on one rank": Case(
        (at("step:19", "raise the wheel came off", 1),), "failed", "unknown", "the wheel came off", True, (18, 18)
    ),
    "out of memory on one rank": Case(
        (at("forward:20", "memory", 1),), "failed", OOM, "a GPU ran out of memory, on rank 1", False, (18, 18)
    ),
    "SIGSTOP of a worker": Case(
        (at("step:21", "SIGSTOP", 1),),  # two steps of this attempt are known by then
        *("failed", "hang", "rank 1 .*stopped, by SIGSTOP", True, (18, 18)),
        fields={"train.hang_timeout": 5},
    ),
    "stop that is not obeyed in time": Case(
        (at("step:20", "launcher SIGTERM", 1), at("step:20", "SIGSTOP", 1)),
        *("stopped", "cancelled", "had not ended 2 s after SIGTERM; rank 1 .*stopped, by SIGSTOP", False, (18, 18)),
        fields={"train.hang_timeout": None, "train.stop_timeout": 4},
    ),
    "two Ctrl-C": Case(
        # Two signals that come before the first was heard are one to the kernel; nobody is that fast.
        (
            at("forward:20", "launcher SIGINT", 0),
            at("step:20", "launcher SIGINT", 0, after=2.0),
            at("step:20", "sleep 30"),
        ),
        *("stopped", "cancelled", "interrupted twice, without a save", False, (18, 18)),
        fields={"train.stop_timeout": "auto"},
    ),
    "signal while the model is published": Case(
        (at("publish", "SIGTERM"),), "stopped", "cancelled", "the model is complete", False, (24, 24)
    ),
}

ALONE: dict[str, Case] = {
    "signal during evaluation, one process": Case(
        (at("evaluate:5", "SIGTERM"),), "stopped", "cancelled", "SIGTERM at step 5", False, (5, 5)
    ),
    "two Ctrl-C, one process": Case(
        (at("step:7", "SIGINT"), at("step:7", "SIGINT")), "stopped", "cancelled", "interrupted twice", False, (6, 6)
    ),
    "disk full": Case(
        (at("step:8", "fill {run}/filler"),),
        "failed",
        "disk",
        "",
        False,
        (6, 6),
        fields={"checkpoint.save_strategy": "no", "checkpoint.save_steps": None},
    ),
    "disk full during save": Case(
        (at("save:9", "fill {run}/filler"),),
        "failed",
        "disk",
        "",
        False,
        (6, 6),
        code=5,
        fields={"checkpoint.save_strategy": "steps", "checkpoint.save_steps": 3},
    ),
    "read-only directory": Case(
        (at("step:8", "readonly {run}/checkpoints"),), "failed", "disk", "[Rr]ead-only", False, (6, 6), code=5
    ),
    "SIGKILL during save, one process": Case((at("save:9", "SIGKILL"),), "lost", "", "", None, (6, 6), code=-9),
    "tracker unreachable": Case(
        (),
        "done",
        fields={"tracking.report_to": ["wandb"], "tracking.wandb_mode": "online"},
        variables={"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"},
        saved=(24, 24),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of a few megabytes; an ordinary folder where none can be mounted, and what needs it skips."""
    path = tmp_path_factory.mktemp("disk")
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], capture_output=True
        ).returncode
    )
    yield path
    if mounted:
        subprocess.run(["umount", "--lazy", "--recursive", path], check=False)


@pytest.fixture(scope="module")
def reference(server: Server, make_run: MakeRun, folder: Path) -> dict[str, RunDir]:
    """Runs that nothing happens to."""
    runs = {name: make_run(folder, name, *plan) for name, plan in (("two", TWO), ("one", ONE))}
    for run in runs.values():
        life = server.live(run)
        assert life.code == 0, life.said
    return runs


def survive(server: Server, run: RunDir, cases: Mapping[str, Case]) -> dict[str, tuple[Life, int | None]]:
    """Every case in turn; how each ended, and the step of the newest complete checkpoint then."""
    found = {}
    for name, case in cases.items():
        if case.fields:
            run.config.write_text(write_config(with_values(load_run_config(run.config), case.fields)))
        faults = [{**fault, "do": fault["do"].format(run=run.path)} for fault in case.faults]
        found[name] = server.live(run, *faults, **case.variables), newest(run)
        recover(run)
    return found


def newest(run: RunDir) -> int | None:
    return next((step for step, path in list_checkpoints(run) if damage(path) is None), None)


def recover(run: RunDir) -> None:
    """Somebody has cleaned up: the disk has room again and can be written."""
    (run.path / "filler").unlink(missing_ok=True)
    # A bind mount on the same file system is none for os.path.ismount.
    subprocess.run(["umount", run.checkpoints], check=False, capture_output=True)


@pytest.fixture(scope="module")
def two(server: Server, make_run: MakeRun, folder: Path) -> tuple[RunDir, dict[str, Any]]:
    """Two processes under a launcher."""
    run = make_run(folder, "survivor", *TWO)
    return run, survive(server, run, CASES)


@pytest.fixture(scope="module")
def one(server: Server, make_run: MakeRun, small_disk: Path) -> tuple[RunDir, dict[str, Any]]:
    """One process, on a small disk."""
    run = make_run(small_disk, "alone", *ONE)
    cases = ALONE
    if not os.path.ismount(small_disk):
        cases = {name: case for name, case in ALONE.items() if case.kind != "disk"}
    return run, survive(server, run, cases)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(two: tuple[RunDir, dict[str, Any]], name: str) -> None:
    assert_ended(CASES[name], *two[1][name])


@pytest.mark.parametrize("name", ALONE)
def test_one_process(one: tuple[RunDir, dict[str, Any]], name: str) -> None:
    if name not in one[1]:
        pytest.skip("needs a file system of its own, and none can be mounted here")
    assert_ended(ALONE[name], *one[1][name])


def assert_ended(case: Case, life: Life, saved: int | None) -> None:
    codes = {"stopped": 75, "failed": 1, "done": 0}
    assert life.code == (codes[case.ends] if case.code is None else case.code), life.said
    assert "Traceback" not in life.said or case.ends in ("failed", "lost"), life.said
    low, high = case.saved or (None, None)
    assert saved is None if low is None else low <= (saved or -1) <= (high or -1), life.said
    # The line of an attempt that was lost is written by the next one.
    mine = [line for line in life.lines if line["decided"] != "lost"] if case.ends != "done" else list(life.lines)
    if case.ends == "lost":
        assert mine == []
        return
    line = mine[-1]
    assert line["ended"] == case.ends, line
    assert life.status["state"] == case.ends
    if case.ends == "done":
        return
    assert line["failure"]["kind"] == case.kind, line
    assert re.search(case.reason, line["reason"]) or re.search(case.reason, line["failure"]["sentence"]), line
    over = {"stopped": "over: it was stopped", "failed": "over: it failed, and nothing requeues it here"}
    assert line["decided"] == over[case.ends]
    failure = Failure(case.kind, "")
    assert decide(failure, [{"reached": {"step": 5}}], 10, 0).requeue == case.comes_back


def rows(run: RunDir, name: str, *more: str) -> list[tuple[Any, ...]]:
    """(step, value...) of the rows of metrics.jsonl that have the field `name`."""
    found = [row for row in read_jsonl(run.metrics) if name in row]
    return [tuple(row[key] for key in ("step", name, *more)) for row in found]


def assert_same(run: RunDir, other: RunDir) -> None:
    """The same losses, each step once, the same evaluations and weights."""
    assert [row[0] for row in rows(run, "loss")] == list(range(1, STEPS + 1))
    assert rows(run, "loss", "grad_norm", "learning_rate") == rows(other, "loss", "grad_norm", "learning_rate")
    assert rows(run, "eval_loss") == rows(other, "eval_loss"), "an evaluation was lost, or is another"
    mine, theirs = (load_file(it.model / "model.safetensors") for it in (run, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_after_all_of_it_two_processes_have_lost_nothing(
    two: tuple[RunDir, dict[str, Any]], reference: dict[str, RunDir]
) -> None:
    assert_same(two[0], reference["two"])


def test_after_all_of_it_one_process_has_lost_nothing(
    one: tuple[RunDir, dict[str, Any]], reference: dict[str, RunDir]
) -> None:
    assert_same(one[0], reference["one"])


def test_an_attempt_that_was_lost_is_put_on_record_by_the_next(two: tuple[RunDir, dict[str, Any]]) -> None:
    lines = read_jsonl(two[0].attempts)
    assert [line["attempt"] for line in lines] == list(range(1, len(CASES) + 1))
    (lost,) = [line for line in lines if line["decided"] == "lost"]
    assert lost["attempt"] == list(CASES).index("SIGKILL of the launcher") + 1


def test_an_evaluation_that_a_stop_left_out_is_said_and_made_up_for(two: tuple[RunDir, dict[str, Any]]) -> None:
    names = list(CASES)
    for name, step in (("signal during evaluation", 5), ("signal during save", 10)):
        assert f"the evaluation due at step {step} comes after the resume" in two[1][name][0].said
        after = two[1][names[names.index(name) + 1]][0]
        assert f"evaluating at step {step}: the stop had left it out" in after.said


def test_metrics_wait_for_room_on_the_disk(one: tuple[RunDir, dict[str, Any]]) -> None:
    """All steps are trained although their rows cannot be written; what ends the run is that the model cannot be."""
    if "disk full" not in one[1]:
        pytest.skip("needs a file system of its own, and none can be mounted here")
    life = one[1]["disk full"][0]
    assert "metrics.jsonl cannot be written (No space left on device); its rows are kept in memory" in life.said
    assert re.search(r"step 24/24 ", life.said)
    assert life.line["last_step"] == STEPS


def test_what_a_tracker_missed_is_counted(one: tuple[RunDir, dict[str, Any]]) -> None:
    life = one[1]["tracker unreachable"][0]
    assert life.said.count("wandb failed and is off for the rest of this run") == 1
    assert life.line["metrics_missed"]["wandb"] >= STEPS - 9


def test_clocks_that_jump_change_nothing(
    server: Server, make_run: MakeRun, reference: dict[str, RunDir], folder: Path
) -> None:
    """Hours ahead on one host, hours back on the other in the middle of the run, and in the next attempt a day back."""
    run = make_run(folder, "clock", *TWO)
    jumps = (at("prepare", "clock 7200", 1), at("step:3", "clock -10800", 0), at("step:6", "SIGTERM", 1))
    first = server.live(run, *jumps)
    assert (first.code, newest(run)) == (75, 6), first.said
    last = server.live(run, at("start", "clock -86400"), at("command", "clock -86400"))
    assert last.code == 0, last.said
    assert_same(run, reference["two"])
    lines = read_jsonl(run.attempts)
    assert [(line["attempt"], line["ended"]) for line in lines] == [(1, "stopped"), (2, "done")]
    assert lines[1]["start"] < lines[0]["start"], "the clock did not jump"
    assert all(row["tokens_per_s"] > 0 for row in read_jsonl(run.metrics) if "loss" in row)
    left = re.findall(r"left (\d+):(\d\d):(\d\d)", first.said + last.said)
    assert left
    assert all(int(hours) == 0 for hours, _, _ in left)


def test_a_hang_is_noticed_although_the_clock_jumps(server: Server, make_run: MakeRun, folder: Path) -> None:
    run = make_run(folder, "clock-hang", *TWO, "train.hang_timeout=5")
    life = server.live(run, at("command", "clock -7200"), at("step:2", "clock 7200", 1), at("step:4", "SIGSTOP", 1))
    assert (life.code, life.kind) == (1, "hang"), life.said
    assert life.line["failure"]["rank"] == 1
