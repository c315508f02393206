"""What is seen of a process from outside: its state, its stacks, and what its main thread waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_dist.jobs import stacks

Begin = Callable[[str], "subprocess.Popen[str]"]

# A worker: it beats as rank 3 of a run, and then does what the test wants.
WORKER = """
import sys, ctypes, os
from pathlib import Path
from sft_dist.train import heartbeat
heartbeat.begin(3, Path(sys.argv[1]))
print("ready", flush=True)
"""
# Blocked in C while it holds Python's lock: no Python code can run, in no thread.
BLOCKED = """
def blocked_in_c():
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
blocked_in_c()
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", WORKER + code, str(tmp_path)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": ""})
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def no_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks.shutil, "which", lambda name: None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_is_blocked_in_c_with_pythons_lock_still_answers(begin: Begin, tmp_path: Path) -> None:
    worker = begin(BLOCKED)
    until(lambda: stacks.state_of(worker.pid) == "S")
    found = stacks.dump_stacks(tmp_path / "logs", {3: worker.pid})
    assert "in blocked_in_c" in found[3]
    assert stacks.waits(found[3]) is False
    again = stacks.dump_stacks(tmp_path / "logs", {3: worker.pid})
    assert again[3].count("in blocked_in_c") == 1, "the answer to the first question is left out"
    assert worker.poll() is None, "asking must not end it, nor what it waits for"


def test_a_stopped_process_is_said_to_be_so(begin: Begin, tmp_path: Path) -> None:
    worker = begin(BLOCKED)
    os.kill(worker.pid, signal.SIGSTOP)
    until(lambda: stacks.state_of(worker.pid) == "T")
    assert "stopped and cannot answer" in stacks.dump_stacks(tmp_path / "logs", {3: worker.pid})[3]


def test_a_process_without_an_answer_is_not_ended_by_the_question(tmp_path: Path) -> None:
    plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert "not started far enough" in stacks.dump_stacks(tmp_path, {0: plain.pid})[0]
        assert plain.poll() is None
    finally:
        plain.kill()
        plain.wait()
    assert stacks.dump_stacks(tmp_path, {0: plain.pid})[0] == "it has ended"
    assert stacks.state_of(plain.pid) == "X"


def test_a_crash_leaves_its_stack_and_a_good_end_leaves_no_file(begin: Begin, tmp_path: Path) -> None:
    crashed = begin("def crash():\n    ctypes.string_at(0)\ncrash()\n")
    assert crashed.wait() == -signal.SIGSEGV
    text = stacks.stacks_file(tmp_path / "logs", 3).read_text()
    assert "Segmentation fault" in text
    assert "in crash" in text
    stacks.stacks_file(tmp_path / "logs", 3).unlink()
    assert begin("").wait() == 0
    assert not stacks.stacks_file(tmp_path / "logs", 3).exists()


def test_py_spy_is_asked_first_where_there_is_one(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text(
        '#!/bin/sh\n[ "$3" = 1 ] && exit 1\necho "Thread $3 (idle): \\"MainThread\\""\necho "    wait (x.py:1)"\n'
    )
    spy.chmod(0o755)
    monkeypatch.setattr(stacks.shutil, "which", lambda name: str(spy))
    assert stacks.dump_stacks(tmp_path, {0: 4242})[0].splitlines() == [
        'Thread 4242 (idle): "MainThread"',
        "    wait (x.py:1)",
    ]
    worker = begin(BLOCKED)
    until(lambda: stacks.state_of(worker.pid) == "S")
    spy.write_text("#!/bin/sh\nexit 1\n")  # it may not look into processes
    assert "in blocked_in_c" in stacks.dump_stacks(tmp_path / "logs", {3: worker.pid})[3]


FAULTHANDLER = """Thread 0x1 (most recent call first):
  File "x/threading.py", line 1 in wait

Current thread 0x2 (most recent call first):
  File "{innermost}
  File "sft_dist/train/worker.py", line 91 in train
"""


@pytest.mark.parametrize(
    ("innermost", "expected"),
    [
        ('site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce', True),
        ('site-packages/torch/autograd/graph.py", line 869 in _engine_run_backward', True),
        ('site-packages/torch/nn/utils/clip_grad.py", line 9 in clip_grad_norm_', True),
        ('site-packages/torch/nn/modules/linear.py", line 125 in forward', False),
        ('site-packages/datasets/arrow_dataset.py", line 5 in __getitem__', False),
    ],
)
def test_who_waits_for_others_is_told_by_the_innermost_frames(innermost: str, expected: bool) -> None:
    assert stacks.waits(FAULTHANDLER.format(innermost=innermost)) is expected


def test_the_main_thread_is_the_one_that_counts() -> None:
    spied = 'Thread 7 (active): "MainThread"\n    forward (model.py:1)\nThread 8 (idle): "x"\n    barrier (y.py:1)\n'
    assert stacks.waits(spied) is False
    assert stacks.waits("it is stopped and cannot answer") is None
    assert stacks.waits("") is None


def test_what_the_user_set_of_the_flight_recorder_stays(tmp_path: Path) -> None:
    found = stacks.flight_recorder({}, tmp_path / "logs", tmp_path / "beats")
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/logs/nccl-trace-rank-"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(found["TORCH_FR_BUFFER_SIZE"]) > 0
    theirs = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "9",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "x",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    rest = stacks.flight_recorder(theirs, tmp_path, tmp_path)
    assert set(rest) == {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE"}, "the older names count, too"


def test_a_pipe_that_nobody_reads_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nccl-0.pipe")
    os.mkfifo(tmp_path / "nccl-1.pipe")
    reader = os.open(tmp_path / "nccl-1.pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert stacks.ask_flight_recorder(tmp_path) == 1
    assert os.read(reader, 10) == b"1\n"
    os.close(reader)
