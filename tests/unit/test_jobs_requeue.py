"""What follows when an attempt in a job has ended, and what is put on record of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sft_dist.errors import ConfigError, RunStopped, SftDistError, failure
from sft_dist.files import append_jsonl, read_jsonl
from sft_dist.jobs import evidence, requeue
from sft_dist.jobs.board import Board
from sft_dist.jobs.decision import decide, reached, without_progress
from sft_dist.jobs.failures import Failure
from sft_dist.jobs.last_words import leave_ending, leave_kind, leave_words, leaving_words, read_words
from sft_dist.jobs.place import Place
from sft_dist.jobs.requeue import Settler, bury, exclude_list
from sft_dist.rundir import RunDir

TERM, USR2 = signal.SIGTERM, signal.SIGUSR2
NEVER = ("config", "data", "out_of_memory", "disk", "numbers", "checkpoint", "cancelled")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "WORDS_S", 0.0)
    monkeypatch.setattr(evidence, "OTHERS_S", 0.0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text("slurm: {exclude: 'n[8-9]'}\n")
    run.write_status(state="running", attempt=1, step=3)
    marker = str(tmp_path / "slurm" / "m")
    return Place("41", 0, ("n1", "n2"), 0, 0, 2, "n1", 20001, str(run.path), requeues=2, marker=marker)


def run_of(place: Place) -> RunDir:
    return RunDir(Path(place.run))


def settled(place: Place | None, run: RunDir, state: str, reason: str | None = "", number: int = 0) -> dict[str, Any]:
    """What goes on record, with the run's state and reason after it."""
    after, why, facts = Settler(run, place)(state, reason, number, True)
    return {**facts, "state": after, "reason": why}


@pytest.mark.parametrize(("number", "why"), [(TERM, "preemption"), (USR2, "time limit")])
def test_what_the_cluster_stops_goes_back_into_the_queue(place: Place, number: int, why: str) -> None:
    line = settled(place, run_of(place), "stopped", "stopped at step 3", number)
    assert (line["state"], line["reason"]) == ("queued", "stopped at step 3; requeue 1 of 2")
    assert line["decided"] == f"requeue 1 of 2: {why}"
    assert (line["job_id"], line["nodes"]) == ("41", ["n1", "n2"])


@pytest.mark.parametrize(("state", "number"), [("stopped", TERM), ("failed", 0)])
def test_not_more_often_than_asked_for(place: Place, state: str, number: int) -> None:
    run = run_of(place)
    assert settled(dataclasses.replace(place, restart=1), run, state, "x", number)["state"] == "queued"
    for given in ({"restart": 2}, {"requeues": 0}):
        line = settled(dataclasses.replace(place, **given), run, state, "x", number)
        assert (line["state"], line["decided"][:6]) == (state, "over: ")


@pytest.mark.parametrize(("state", "number"), [("stopped", TERM), ("failed", 0)])
def test_a_cancelled_run_stays_stopped(place: Place, state: str, number: int) -> None:
    run = run_of(place)
    run.cancelled.touch()
    line = settled(place, run, state, "stopped at step 3", number)
    assert (line["state"], line["decided"]) == (state, "over: it was cancelled")


def test_ctrl_c_is_a_persons_stop(place: Place) -> None:
    line = settled(place, run_of(place), "stopped", "stopped", signal.SIGINT)
    assert (line["state"], line["failure"]["kind"]) == ("stopped", "cancelled")


def test_a_link_of_a_chain_leaves_the_run_to_the_next(place: Place) -> None:
    settle = Settler(run_of(place), place)
    assert settle("done", None, 0, False)[0] == "queued"
    state, _, facts = settle("done", None, 0, True)
    assert (state, facts["decided"], "failure" in facts) == ("done", "done", False)


def test_a_wrong_config_is_over_and_a_lost_worker_is_not(place: Place) -> None:
    run = run_of(place)
    leave_words(run, ConfigError("train.x is wrong"), None)
    line = settled(place, run, "failed", "train.x is wrong")
    assert (line["state"], line["reason"]) == ("failed", "train.x is wrong")
    assert line["decided"] == "over: config, which another attempt does not change"
    run.write_status(attempt=2)
    leave_ending(run, 1, 77, signal.SIGKILL)
    line = settled(place, run, "failed", "said")
    assert (line["state"], line["decided"]) == ("queued", "again in this job: unknown")
    assert line["failure"] == {
        "kind": "unknown",
        "sentence": "rank 1 (process 77) was killed by SIGKILL",
        "evidence": "SIGKILL",
        "node": line["failure"]["node"],
        "rank": 1,
    }


def test_a_bad_node_is_left_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(place)
    for attempt, node in ((1, "n2"), (2, "n1")):
        monkeypatch.setenv("SFT_DIST_PLACE", dataclasses.replace(place, node=int(node == "n2")).to_text())
        run.write_status(attempt=attempt, step=3 * attempt)
        leave_words(run, RuntimeError("CUDA error: uncorrectable ECC error encountered"), 5)
        line = settled(dataclasses.replace(place, restart=attempt - 1), run, "failed", "x")
        assert line["decided"] == f"requeue {attempt} of 2 without {node}: node"
        append_jsonl(run.attempts, line)
    assert exclude_list(run, "41") == "n[8-9],n2,n1"
    assert exclude_list(run, "42") == ""
    # A job whose user named the nodes would wait for ever.
    run.config.write_text("slurm: {nodelist: 'n[1-2]'}\n")
    run.write_status(step=9)
    assert settled(place, run, "failed", "x")["decided"] == "requeue 1 of 2: node"


def test_without_slurm_it_is_classified_and_never_requeued(place: Place) -> None:
    run = run_of(place)
    leave_words(run, OSError(errno.ENOSPC, "No space left on device"), 0)
    line = settled(None, run, "failed", "x")
    assert (line["state"], line["failure"]["kind"], "requeue " in line["decided"]) == ("failed", "disk", False)
    assert line["reason"].startswith("the disk is full, on rank 0")
    assert "job_id" not in line
    assert settled(None, run, "done")["state"] == "done"
    assert settled(None, run, "stopped", "stopped at 3", signal.SIGINT)["reason"] == "stopped at 3"


def test_words_of_an_attempt_stay_its_own(place: Place) -> None:
    run = run_of(place)
    with pytest.raises(ValueError, match="first"), leaving_words(run, 2):
        raise ValueError("first")
    leave_words(run, ValueError("second"), 2)
    leave_kind(run, "hang", "rank 1 has not moved", 1, "n7")
    found = {(word.kind, word.message): word for word in read_words(run, 1)}
    assert found.keys() == {(None, "first"), ("hang", "rank 1 has not moved")}
    assert found["hang", "rank 1 has not moved"].node == "n7"
    assert read_words(run, 2) == []
    (run.logs / "failed" / "1-9.json").write_text('{"type": 3, "no": 1}')
    (run.logs / "failed" / "1-8.json").write_text("{")
    assert len(read_words(run, 1)) == 2


def test_words_hold_what_an_error_was_raised_from(place: Place) -> None:
    run = run_of(place)
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "/x")
        except OSError as error:
            raise RuntimeError("saving failed\nException raised from write (most recent call first)") from error
    except RuntimeError as error:
        leave_words(run, error, 0)
    (word,) = read_words(run, 1)
    assert (word.message, word.chain[0][2], word.rank) == ("saving failed", errno.EDQUOT, 0)
    for other in (RunStopped("stop"), KeyboardInterrupt()):
        with pytest.raises(type(other)), leaving_words(run, 7):
            raise other
    leave_words(run, failure("another failed", 1), 8)
    assert [word.echo for word in read_words(run, 1)] == [False, True]


def test_a_stop_while_modules_load_is_a_stop(place: Place) -> None:
    """transformers and trl import on first use, and raise what goes wrong meanwhile again as an error of their own."""
    run = run_of(place)
    with pytest.raises(RunStopped, match=r"^stopped by SIGUSR1$"), leaving_words(run):
        try:
            raise RunStopped("stopped by SIGUSR1")
        except RunStopped as error:
            raise RuntimeError("Failed to import trl.trainer.sft_config") from error
    assert read_words(run, 1) == []
    with pytest.raises(OSError, match="full"), leaving_words(run):
        try:
            raise RunStopped("stopped by SIGUSR1")
        except RunStopped:
            raise OSError("the disk is full")  # noqa: B904
    assert len(read_words(run, 1)) == 1


def test_words_never_raise(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    leave_words(RunDir(tmp_path), ValueError("x"), 0)
    leave_ending(RunDir(tmp_path), 0, 1, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert (tmp_path / "logs").read_text() == "a file"


def line(step: int = 0, checkpoint: int = 0, stages: int = 0, job: str = "41") -> dict[str, Any]:
    return {"job_id": job, "reached": {"step": step, "checkpoint": checkpoint, "stages": stages}}


@pytest.mark.parametrize(
    ("history", "fruitless"),
    [
        ([], 0),
        ([line()], 1),
        ([line(5)], 0),
        ([line(5), line(5)], 1),
        ([line(5), line(4), line(5)], 2),
        ([line(5), line(4), line(6)], 0),
        ([line(5, 3), line(4, 4)], 0),
        ([line(stages=1), line(stages=1)], 1),
        ([line(9, job="40"), line(), line()], 2),
        ([line(job="40"), line(job="40"), line()], 1),
        ([{"job_id": "41", "last_step": 5}, {"job_id": "41", "reached": 3}], 1),
    ],
)
def test_progress_is_further_than_any_attempt_before(history: list[dict[str, Any]], fruitless: int) -> None:
    assert without_progress(history) == fruitless


@pytest.mark.parametrize("kind", ["network", "hang", "unknown", "node"])
def test_what_may_go_away_is_tried_again_while_it_gets_further(kind: str) -> None:
    failed = Failure(kind, "it broke")
    assert decide(failed, [line(5)], 10, 0).requeue
    assert decide(failed, [line(5), line(5)], 10, 1).text == f"requeue 2 of 10: {kind}"
    last = decide(failed, [line(5), line(5), line(5)], 10, 2)
    assert (last.requeue, last.text) == (False, f"over: {kind}, 2 attempts in a row without progress")
    assert decide(failed, [line(5), line(5), line(6)], 10, 2).requeue


@pytest.mark.parametrize("kind", ["network", "hang", "unknown"])
def test_a_job_keeps_its_nodes_while_the_run_gets_further_on_them(kind: str) -> None:
    failed = Failure(kind, "it broke")
    first = decide(failed, [line(5)], 10, 0, stays=True)
    assert (first.here, first.requeue, first.text) == (True, False, f"again in this job: {kind}")
    assert decide(failed, [line(5), line(9)], 10, 1, stays=True).here
    stuck = decide(failed, [line(5), line(5)], 10, 1, stays=True)
    assert (stuck.here, stuck.requeue) == (False, True), "the nodes may be to blame"
    assert decide(failed, [line(5)], 10, 10, stays=True).text.startswith("over: "), "it counts as a requeue does"
    assert decide(failed, [line(5)], 0, 0, stays=True).text.endswith("requeueing is off")


@pytest.mark.parametrize("kind", ["node", "preemption", "time_limit", *NEVER])
def test_what_new_processes_do_not_change_is_none_of_that(kind: str) -> None:
    assert not decide(Failure(kind, "it broke", node="n1"), [line(5)], 10, 0, stays=True).here


@pytest.mark.parametrize(("state", "number"), [("stopped", TERM), ("failed", USR2)])
def test_who_was_asked_to_stop_leaves_the_job(place: Place, state: str, number: int) -> None:
    run = run_of(place)
    leave_ending(run, 1, 77, signal.SIGKILL)
    assert settled(place, run, state, "said", number)["decided"].startswith("requeue 1 of 2")


@pytest.mark.parametrize("kind", NEVER)
def test_what_stays_is_not_tried_again(kind: str) -> None:
    decision = decide(Failure(kind, "it broke"), [line(5)], 10, 0)
    assert (decision.requeue, decision.text[:6]) == (False, "over: ")


def test_a_time_limit_before_the_first_save_does_not_loop() -> None:
    short = Failure("time_limit", "out of time")
    assert decide(short, [line(), line()], 10, 1).requeue
    last = decide(short, [line(), line(), line()], 10, 2)
    assert not last.requeue
    assert "slurm.time" in last.why
    assert "checkpoint.save_steps" in last.why


@pytest.mark.parametrize("name", ["n 2", "n2;reboot", "$(x)", "-n2", "n2\n", ""])
def test_only_a_nodes_name_is_excluded(name: str) -> None:
    assert decide(Failure("node", "", node=name), [line(5)], 10, 0).without is None


def test_how_far_a_run_has_come(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert reached(run) == {"step": 0, "checkpoint": 0, "stages": 0}
    run.write_status(step=12)
    for name in ("checkpoint-8", "checkpoint-10", "checkpoint-x", "torn-checkpoint-11"):
        (run.checkpoints / name).mkdir(parents=True)
        if name != "checkpoint-10":
            (run.checkpoints / name / "MANIFEST.json").touch()
    run.eval.mkdir()
    (run.eval / "before.jsonl").touch()
    assert reached(run) == {"step": 12, "checkpoint": 8, "stages": 1}
    run.metrics.write_text('{"step": 13, "loss": 1.0}\n{"step": 14, "lo', encoding="utf-8")
    assert reached(run)["step"] == 13, "status.json is some seconds late where the process was killed"
    (run.checkpoints / "checkpoint-14").mkdir()
    (run.checkpoints / "checkpoint-14" / "MANIFEST.json").touch()
    assert reached(run) == {"step": 14, "checkpoint": 14, "stages": 1}


def test_an_attempt_that_left_no_line_gets_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(place)
    asked = 'echo "NODE_FAIL|1:0|None"; echo "RUNNING|0:0|None"'
    tools = run.path.parent / "bin"
    tools.mkdir()
    (tools / "sacct").write_text(f"#!/bin/sh\n{asked}\n")
    (tools / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    run.write_status(attempt=0)
    Settler(run, place).begin()
    run.write_status(attempt=1)
    Settler(run, dataclasses.replace(place, restart=1)).begin()
    (row,) = read_jsonl(run.attempts)
    assert (row["attempt"], row["ended"], row["decided"], row["restart"]) == (1, "failed", "lost", 0)
    assert (row["failure"]["kind"], row["reached"]["step"]) == ("node", 3)
    assert bury(run, place) is None
    run.write_status(attempt=2, state="done")
    assert bury(run, None) is None


@pytest.mark.parametrize("by", ["submit", "resume"])
def test_an_attempt_that_left_no_line_stays_that_of_its_job(place: Place, by: str) -> None:
    run = run_of(place)
    run.write_status(attempt=0)
    Settler(run, place).begin()
    run.write_status(attempt=1)
    Settler(run, dataclasses.replace(place, job="42", restart=0) if by == "submit" else None).begin()
    (row,) = read_jsonl(run.attempts)
    assert (row["job_id"], row["restart"], row["nodes"]) == ("41", 0, ["n1", "n2"])
    assert (run.read_status()["job"] or {}).get("job_id") == ("42" if by == "submit" else None)


def test_the_end_of_the_task_is_no_preemption(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that keeps the record gets SIGTERM then, too."""
    settle = Settler(run_of(place), place)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    _, why, facts = settle("stopped", "stopped by SIGTERM", TERM, True)
    assert why == "stopped by SIGTERM, since the job's task was killed; requeue 1 of 2"
    assert (facts["failure"]["kind"], facts["decided"]) == ("unknown", "requeue 1 of 2: unknown")


def test_a_run_that_takes_its_node_down_each_time_comes_to_an_end(place: Place) -> None:
    """SLURM brings such a job back by itself, as often as it happens; no attempt ever decides anything."""
    run = run_of(place)
    run.write_status(attempt=0, step=0)
    for restart in range(4):
        here = dataclasses.replace(place, restart=restart, requeues=10)
        if restart < 3:
            Settler(run, here).begin()
            run.write_status(attempt=len(read_jsonl(run.attempts)) + 1, state="running")
            continue
        with pytest.raises(SftDistError, match="3 attempts in a row without progress") as refused:
            Settler(run, here).begin()
        assert f"sft-dist submit {run.path}" in str(refused.value)
    assert [row["decided"] for row in read_jsonl(run.attempts)] == ["lost"] * 3
    assert run.read_status()["state"] == "failed"
    Settler(run, dataclasses.replace(place, job="42", restart=0)).begin()
    Settler(run, dataclasses.replace(place, job="42", restart=1)).begin()


def test_lost_attempts_that_get_further_do_not(place: Place) -> None:
    run = run_of(place)
    for restart in range(8):
        Settler(run, dataclasses.replace(place, restart=restart)).begin()
        run.write_status(attempt=len(read_jsonl(run.attempts)) + 1, state="running", step=5 * restart + 5)
    assert len(read_jsonl(run.attempts)) == 8


def test_a_killed_supervisor_is_put_on_record_by_its_task(place: Place) -> None:
    run = run_of(place)
    leave_ending(run, None, 5, signal.SIGKILL, oom_kills=1)
    row = bury(run, place, now=True)
    assert row is not None
    assert (row["failure"]["kind"], run.read_status()["state"]) == ("out_of_memory", "failed")
    run.write_status(attempt=2, state="running")
    leave_ending(run, None, 6, signal.SIGKILL)
    row = bury(run, place, now=True)
    assert row is not None
    assert (row["decided"], run.read_status()["state"]) == ("requeue 1 of 2: unknown", "queued")
    assert row["reason"] == "the process of the run (process 6) was killed by SIGKILL; requeue 1 of 2"


def test_only_what_a_log_says_of_this_attempt_counts(place: Place) -> None:
    run = run_of(place)
    path = Path(place.marker).parent / "41_0_log.err"
    path.parent.mkdir()
    path.write_text("srun: error: n2: task 4: Out Of Memory\n")
    settle = Settler(run, place)
    settle.begin()
    with path.open("a") as stream:
        stream.write("[E ProcessGroupNCCL.cpp:455] NCCL error: remote process exited or there was a network error\n")
    assert settle("failed", "x", 0, True)[2]["failure"]["kind"] == "network"
    assert Settler(run, place)("failed", "x", 0, True)[2]["failure"]["kind"] == "out_of_memory"


def test_slurm_is_asked_about_the_nodes_when_a_connection_is_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(place)
    tools = run.path.parent / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho JobId=41 JobState=RUNNING Reason=None ExitCode=0:0\n")
    (tools / "sinfo").write_text("#!/bin/sh\nprintf 'n1|mixed\\nn2|down*\\nn3|down\\n'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    leave_words(run, RuntimeError("Connection closed by peer [10.0.0.2]:5423"), 0)
    found = settled(place, run, "failed", "x")
    assert (found["failure"]["kind"], found["failure"]["node"], found["without"]) == ("node", "n2", "n2")


def test_the_words_of_another_node_may_come_late(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(place)
    leave_words(run, RuntimeError("Connection closed by peer [10.0.0.2]:5423"), 0)
    monkeypatch.setattr(evidence, "OTHERS_S", 60.0)
    late = iter((lambda: None, lambda: leave_ending(run, 3, 77, signal.SIGKILL, oom_kills=1)))
    monkeypatch.setattr(evidence.time, "sleep", lambda _: next(late)())
    found = settled(place, run, "failed", "x")
    assert (found["failure"]["kind"], found["failure"]["rank"]) == ("out_of_memory", 3)


def test_a_record_that_cannot_be_read_is_no_second_failure(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Failure:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(requeue, "explain", broken)
    assert settled(place, run_of(place), "failed", "it broke")["failure"]["sentence"] == "it broke"


def test_facts_are_json(place: Place) -> None:
    assert json.loads(json.dumps(Failure("node", "x", rank=3).facts()))["rank"] == 3


def test_the_board_keeps_starts_apart_and_survives_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "slurm" / "board.jsonl"
    Board(path, "41.0", 0).say("end")
    now = Board(path, "41.1", 0)
    assert now.said("end") == []
    now.say("train", processes=2)
    with path.open("a") as stream:
        stream.write('{"key": "41.1", "wo')
    assert [line["processes"] for line in Board(path, "41.1", 3).said("train")] == [2]
    assert Board(tmp_path / "nowhere", "1", 0).said("end") == []
