"""squeue and sacct: their formats, one call whatever the number of jobs, and what happens where there are none."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.jobs import queue as queue_module
from sft_dist.jobs.queue import Job, Queue, ask_accounting, ask_queue, call, is_job_id, local_cluster

Fake = Callable[[str, str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake("squeue", "echo ...")` puts a command on a PATH without others of SLURM; returns the file of its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/nowhere")

    def make(name: str, script: str) -> Path:
        path, calls = folder / name, tmp_path / f"{name}.calls"
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {calls}\n{script}\n', encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return calls

    return make


def test_squeue_is_called_once_for_all_jobs_and_read(fake: Fake) -> None:
    lines = [
        "12|RUNNING|2026-11-22T10:00:00|2026-11-23T10:00:00|2|None",
        "13|PENDING|2026-11-22T12:30:00|N/A|1|Priority",
        "14_3|PENDING|N/A|N/A|4|Nodes required for job are DOWN, DRAINED or reserved | maybe",
        "99|RUNNING|N/A|N/A|1|someone else's",
        "",
        "slurm is ill",
    ]
    calls = fake("squeue", "/bin/cat <<'E'\n" + "\n".join(lines) + "\nE")
    answer = ask_queue(["13", "12", "14_3", "15", "12"])
    utc = datetime.UTC
    assert answer.jobs == {
        "12": Job("12", "RUNNING", datetime.datetime(2026, 11, 22, 10, tzinfo=utc), datetime.datetime(2026, 11, 23, 10, tzinfo=utc), 2, ""),
        "13": Job("13", "PENDING", datetime.datetime(2026, 11, 22, 12, 30, tzinfo=utc), None, 1, "Priority"),
        "14_3": Job("14_3", "PENDING", None, None, 4, "Nodes required for job are DOWN, DRAINED or reserved | maybe"),
    }  # fmt: skip
    assert (answer.known, answer.notes) == (True, ())
    assert calls.read_text(encoding="utf-8").splitlines() == [
        "--noheader --array --states=all --format=%i|%T|%S|%e|%D|%r --jobs=12,13,14_3,15"
    ]
    assert [answer.jobs[it].phase for it in ("12", "13")] == ["active", "waiting"]


@pytest.mark.parametrize("said", ["slurm is ill", "a|b|c|d|e|f", "usage: squeue [OPTIONS]\n  -A"])
def test_what_is_not_understood_is_no_answer(fake: Fake, said: str) -> None:
    """It was taken for an empty queue: the run was lost, and `cancel` left its job there."""
    fake("squeue", f"echo '{said}'")
    answer = ask_queue(["12"])
    assert (answer.known, answer.silent, answer.jobs) == (False, True, {})
    assert said.splitlines()[0] in answer.notes[0]


@pytest.mark.parametrize("said", ["", "CLUSTER: one", "CLUSTER: one\n99|RUNNING|N/A|N/A|1|None"])
def test_an_empty_queue_is_an_answer(fake: Fake, said: str) -> None:
    fake("squeue", f"echo '{said}'")
    assert ask_queue(["12"]) == Queue(known=True)


def test_no_jobs_no_call(fake: Fake) -> None:
    calls = fake("squeue", "true")
    assert ask_queue([]) == Queue()
    assert ask_queue(["--help", "$(reboot)", "1 2", "١٢", "12_", ""]) == Queue()
    assert not calls.exists()


def test_the_words_for_an_unknown_job_are_an_answer(fake: Fake) -> None:
    fake("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert ask_queue(["12"]) == Queue(known=True)


def test_an_error_is_a_note_and_not_a_failure(fake: Fake) -> None:
    fake(
        "squeue",
        "echo 'squeue: error: ignored' >&2; echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
    )
    answer = ask_queue(["12"])
    assert answer.notes == ("squeue: slurm_load_jobs error: Unable to contact slurm controller",)
    assert (answer.known, answer.silent) == (False, True)


def test_a_queue_that_does_not_answer_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "TIMEOUT_S", 0.3)
    fake("squeue", "exec /bin/sleep 30")
    assert ask_queue(["12"]).notes == ("squeue: no answer within 0 s",)


def test_without_squeue_nothing_is_known(fake: Fake) -> None:
    answer = ask_queue(["12"])
    assert (answer.known, answer.silent) == (False, False)
    assert answer.notes == ("squeue: there is no such command on this host",)
    assert ask_accounting(answer, ["12"]) == answer


def test_users_formats_and_time_zone_have_no_effect(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SLURM_TIME_FORMAT", "TZ"):
        monkeypatch.setenv(name, "relative")
    fake("squeue", 'echo "12|$TZ $SLURM_TIME_FORMAT $SQUEUE_FORMAT$SQUEUE_STATES|N/A|N/A|1|x"')
    assert ask_queue(["12"]).jobs["12"].state == "UTC standard"


def test_sacct_says_how_jobs_ended_that_squeue_has_forgotten(fake: Fake) -> None:
    lines = [
        "12|CANCELLED by 1000|2026-11-22T10:00:00|2026-11-22T11:00:00|2",
        "13|NODE_FAIL|2026-11-22T10:00:00|2026-11-22T11:00:00|1",
        "14|RUNNING|2026-11-22T10:00:00|Unknown|1",
        "15||||",
        "12.batch|CANCELLED|||",
    ]
    calls = fake("sacct", "/bin/cat <<'E'\n" + "\n".join(lines) + "\nE")
    known = Queue({"16": Job("16", "RUNNING")}, known=True)
    answer = ask_accounting(known, ["12", "13", "14", "16"])
    assert {it.id: it.state for it in answer.jobs.values()} == {"12": "CANCELLED", "13": "NODE_FAIL", "16": "RUNNING"}
    assert calls.read_text(encoding="utf-8").splitlines() == [
        "--noheader --parsable2 --allocations --format=JobID,State,Start,End,NNodes --jobs=12,13,14"
    ]
    # Where squeue gave no answer, a record that is still open counts.
    assert ask_accounting(Queue(silent=True), ["14"]).jobs["14"].phase == "active"
    assert len(calls.read_text(encoding="utf-8").splitlines()) == 2


def test_nothing_is_asked_of_sacct_about_jobs_in_the_queue(fake: Fake) -> None:
    calls = fake("sacct", "true")
    queue = Queue({"12": Job("12", "RUNNING")}, known=True)
    assert ask_accounting(queue, ["12"]) == queue
    assert not calls.exists()


def test_accounting_that_is_off_is_a_note(fake: Fake) -> None:
    fake("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    answer = ask_accounting(Queue(known=True), ["12"])
    assert (answer.notes, answer.known) == (("sacct: Slurm accounting storage is disabled",), True)


def test_many_jobs_are_not_put_on_one_command_line(fake: Fake) -> None:
    calls = fake("squeue", "echo '100007|RUNNING|N/A|N/A|1|None'")
    answer = ask_queue(str(number) for number in range(100_000, 120_000))
    assert list(answer.jobs) == ["100007"]
    assert "--jobs" not in calls.read_text(encoding="utf-8")


def test_output_that_is_no_text_is_survived(fake: Fake) -> None:
    fake("squeue", r"printf '\xff\xfe\x00|||\n12|RUNNING|N/A|N/A|x|\xff\n'")
    assert ask_queue(["12"]).jobs["12"].nodes is None


@pytest.mark.parametrize(
    ("text", "good"), [("12", True), ("12_3", True), ("12+1", False), ("-1", False), ("", False), ("12;ls", False)]
)
def test_only_numbers_are_job_ids(text: str, good: bool) -> None:
    assert is_job_id(text) is good


def test_the_cluster_is_that_of_slurm_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm.conf").write_text("# ClusterName=no\n clustername = Big # ours\n", encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert local_cluster() == "Big"
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none"))
    assert local_cluster() is None
    monkeypatch.setenv("SLURM_CLUSTERS", "far")  # squeue and sbatch then ask that one
    assert local_cluster() == "far"


def test_a_command_that_cannot_be_run_is_no_traceback(fake: Fake, tmp_path: Path) -> None:
    fake("scancel", "true")
    (tmp_path / "bin" / "scancel").write_text("no program", encoding="utf-8")
    said = call(["scancel", "1"])
    assert said.error == "scancel: Exec format error"
