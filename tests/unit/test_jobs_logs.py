"""Log files of several nodes as one stream: labels, following, and logs that are not what they should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_dist.files import write_json
from sft_dist.jobs.logs import MAX_LINE, PATIENCE, Follower, harmless, sources
from sft_dist.rundir import RunDir
from tests.conftest import RunCli


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "demo")
    (run.path / "slurm").mkdir(parents=True)
    run.config.write_text("run: {}\n", encoding="utf-8")
    run.write_status(state="stopped")
    return run


def write(run: RunDir, name: str, content: str | bytes, *, age: int = 0) -> Path:
    path = run.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode())
    os.utime(path, (time.time() - age,) * 2)
    return path


def all_lines(run: RunDir, **options: int) -> list[tuple[str, str]]:
    follower = Follower(run, **options)
    return [*follower.news(), *follower.rest()]


def test_files_are_labelled_by_node_or_rank_and_the_oldest_comes_first(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", "a\n", age=9)
    write(run, "slurm/12_0_log.err", "b\n", age=8)
    write(run, "slurm/deeper/12_1_log.out", "c\n", age=7)
    write(run, "slurm/20_4_11_log.out", "d\n", age=6)
    write(run, "logs/rank3.log", "e\n", age=5)
    write(run, "logs/node_2.log", "f\n", age=4)
    write(run, "logs/setup.log", "g\n", age=3)
    write(run, "slurm/12_submitted.pkl", "not a log\n")
    write(run, "slurm/submission.sh", "not a log\n")
    labels = [("n0", "a"), ("n0", "b"), ("n1", "c"), ("n11", "d"), ("r3", "e"), ("n2", "f"), ("setup", "g")]
    assert all_lines(run) == labels
    assert all_lines(run, rank=1) == [("n1", "c")]
    assert [source.number for source in sources(run, 3)] == [3]


def test_logs_of_an_array_lie_in_a_folder_that_its_runs_share(run: RunDir) -> None:
    shared = run.path.parent / "array"
    for name in ("12_3_0_log.out", "12_3_1_log.err", "12_4_0_log.out", "12_33_0_log.out"):
        write(RunDir(shared), name, f"{name}\n")
    write_json(
        run.path / "slurm" / "job.json", {"jobs": [{"job_id": "12_3", "stdout": str(shared / "12_3_0_log.out")}]}
    )
    assert sorted(all_lines(run)) == [("n0", "12_3_0_log.out"), ("n1", "12_3_1_log.err")]
    write(run, "slurm/12_3_0_log.out", "")
    (run.path / "slurm" / "job.json").write_text("{", encoding="utf-8")
    assert all_lines(run) == []


def test_only_what_is_new_is_read_and_new_files_are_picked_up(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", "one\ntw")
    follower = Follower(run)
    assert list(follower.news()) == [("n0", "one")]
    assert list(follower.news()) == []
    write(run, "slurm/12_0_log.out", "o\nthree\n")
    write(run, "slurm/13_0_log.out", "after the requeue\n")
    assert sorted(follower.news()) == [("n0", "after the requeue"), ("n0", "three"), ("n0", "two")]
    assert not list(follower.rest())


def test_a_line_without_an_end_is_shown_after_a_while_and_at_the_end(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", "Segmentation fault")
    follower = Follower(run)
    looks = [list(follower.news()) for _ in range(PATIENCE + 2)]
    assert [line for look in looks for line in look] == [("n0", "Segmentation fault")]
    write(run, "slurm/12_0_log.out", "\nlast")
    assert list(follower.news()) == [("n0", "")]
    assert list(follower.rest()) == [("n0", "last")]


def test_a_file_that_was_emptied_or_replaced_is_read_again(run: RunDir) -> None:
    path = write(run, "slurm/12_0_log.out", "first attempt\n")
    follower = Follower(run)
    list(follower.news())
    path.write_text("second\n", encoding="utf-8")
    assert list(follower.news()) == [("n0", "second")]
    other = write(run, "slurm/new", "third, and longer than it was\n")
    other.replace(path)
    assert list(follower.news()) == [("n0", "third, and longer than it was")]


def test_long_lines_and_binary_data_are_cut_in_bounded_memory(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", b"x" * 3_000_000 + b"\nafter\n" + bytes(range(256)) * 100)
    lines = all_lines(run)
    assert lines[0] == ("n0", "x" * MAX_LINE + f" ... ({3_000_000 - MAX_LINE:,} more bytes)")
    assert lines[1] == ("n0", "after")
    assert all(len(line) < 9 * MAX_LINE and line.replace("\t", "").isprintable() for _, line in lines)


def test_of_a_progress_bar_the_last_state_is_shown(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", "load:   0%\rload:  50%\rload: 100%\ndos\r\nnext\n")
    write(run, "slurm/12_1_log.out", "\r 1%\r 2%")
    assert all_lines(run) == [("n0", "load: 100%"), ("n0", "dos"), ("n0", "next"), ("n1", " 2%")]
    follower = Follower(run, rank=2)
    for part in ("a 10%\r", "a 20%\r", "a 30%", "\r", "\n"):
        write(run, "slurm/12_2_log.out", part)
        lines = list(follower.news())
    assert lines == [("n2", "a 30%")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]never ended", "never ended"),
        ("\x1bPq#0\x1b\\sixel", "sixel"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("a\x1b", "a"),
        ("bell\x07", "bell<U+0007>"),
        ("c1\x9b31m", "c1<U+009B>31m"),
        ("rtl\u202e", "rtl<U+202E>"),
        ("tab\tstays, é 漢 too", "tab\tstays, é 漢 too"),
        ("nul\x00", "nul<U+0000>"),
    ],
)
def test_a_log_cannot_control_the_terminal(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_the_tail_counts_over_the_jobs_of_a_node(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", "".join(f"old {n}\n" for n in range(9)), age=20)
    write(run, "slurm/13_0_log.out", "new 0\nnew 1\n", age=10)
    write(run, "slurm/13_1_log.out", "only\n", age=5)
    assert all_lines(run, tail=3) == [("n0", "old 8"), ("n0", "new 0"), ("n0", "new 1"), ("n1", "only")]
    assert all_lines(run, tail=1) == [("n0", "new 1"), ("n1", "only")]
    assert all_lines(run, tail=0) == []
    assert len(all_lines(run, tail=100)) == 12


def test_the_tail_of_a_large_file_is_found_from_its_end(run: RunDir) -> None:
    write(run, "slurm/12_0_log.out", "".join(f"line {n}\n" for n in range(200_000)))
    started = time.monotonic()
    assert all_lines(run, tail=2) == [("n0", "line 199998"), ("n0", "line 199999")]
    assert len(all_lines(run, tail=20_000)) == 20_000
    assert time.monotonic() - started < 2


def test_what_cannot_be_read_does_not_hide_the_rest(run: RunDir) -> None:
    (run.path / "slurm" / "12_0_log.out").mkdir()
    (run.path / "slurm" / "12_2_log.out").symlink_to("nowhere")
    write(run, "slurm/12_1_log.out", "here\n")
    assert all_lines(run) == [("n1", "here")]
    assert all_lines(run, tail=1) == [("n1", "here")]


def test_the_command_prints_with_labels(run: RunDir, run_cli: RunCli, ask_cli: RunCli) -> None:
    write(run, "slurm/12_0_log.out", "step 1\nstep 2\n漢\n")
    write(run, "slurm/12_1_log.out", "\x1b[31mhello\n")
    done = ask_cli("logs", run.path)
    assert (done.returncode, done.stdout) == (0, "n0| step 1\nn0| step 2\nn0| 漢\nn1| hello\n")
    done = run_cli("logs", run.path, "--rank", "0", "--tail", "1", env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout == "n0| \\u6f22\n"


def test_a_run_without_logs_says_so(run: RunDir, ask_cli: RunCli) -> None:
    done = ask_cli("logs", run.path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no log files" in done.stderr
    assert "not kept in a file" in done.stderr
    write(run, "slurm/job.json", '{"jobs": [{"job_id": "12"}]}')
    assert "the nodes do not see this folder" in ask_cli("logs", run.path).stderr
    write(run, "slurm/12_0_log.out", "step 1\n")
    assert "of node or rank 7" in (said := ask_cli("logs", run.path, "--rank", "7").stderr)
    assert "there are logs of others" in said


def test_following_ends_with_the_run(run: RunDir) -> None:
    run.write_status(state="queued")
    write(run, "logs/rank0.log", "begin\n")
    with run.locked():
        follow = subprocess.Popen(
            [sys.executable, "-m", "sft_dist", "logs", "-f", str(run.path)], stdout=subprocess.PIPE, text=True
        )
        assert follow.stdout is not None
        assert follow.stdout.readline() == "r0| begin\n"
        write(run, "logs/rank1.log", "another file\n")
        assert follow.stdout.readline() == "r1| another file\n"
        run.write_status(state="done")
        time.sleep(0.8)  # its process has its last words still to say
        write(run, "logs/rank1.log", "no newline")
    assert follow.communicate(timeout=20)[0] == "r1| no newline\n"
    assert follow.returncode == 0


def test_ctrl_c_ends_following_quietly(run: RunDir) -> None:
    write(run, "logs/rank0.log", "begin\n")
    with run.locked():
        follow = subprocess.Popen(
            [sys.executable, "-m", "sft_dist", "logs", "-f", str(run.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert follow.stdout is not None
        follow.stdout.readline()
        time.sleep(0.3)
        follow.send_signal(signal.SIGINT)
        assert follow.communicate(timeout=20) == ("", "")
        assert follow.returncode == 0
