"""Starting workers: the command, who hears which signal, and who ends with whom. The workers here are small scripts."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.config.schema import Config
from sft_dist.jobs import launcher
from sft_dist.jobs.board import board_of
from sft_dist.jobs.last_words import read_words
from sft_dist.jobs.launcher import Workers
from sft_dist.jobs.place import Place
from sft_dist.parallel.machine import Gpu, Machine
from sft_dist.parallel.resolve import Resolved, resolve
from sft_dist.rundir import RunDir

LAPTOP = Machine(cpu="x", cores=8, cpu_bf16=False, memory_gib=16.0, gpus=())

# Stands in for torchrun: starts two workers, writes their ids, waits for both.
AGENT = """
import subprocess, sys
workers = [subprocess.Popen([sys.executable, sys.argv[1], sys.argv[2], str(rank)]) for rank in range(2)]
sys.exit(max(abs(worker.wait()) for worker in workers))
"""
# Writes a file when it can hear, ends with 0 on a SIGUSR1 or SIGTERM, and notes which one it was.
WORKER = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), sys.argv[2]
def heard(number, frame):
    (folder / f"heard-{rank}").write_text(signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, heard)
(folder / f"ready-{rank}").write_text(f"{os.getpid()} {os.environ.get('SFT_DIST_ATTEMPT_HELD')} {os.environ.get('OMP_NUM_THREADS')}")
time.sleep(60)
"""


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def two() -> Resolved:
    return resolve(Config.model_validate({"parallel": {"plan": "ddp", "num_processes": 2}}), LAPTOP)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the two scripts and of what the workers leave; the launcher starts them instead of torchrun."""
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "agent.py"), str(tmp_path / "worker.py"), str(tmp_path)]
    monkeypatch.setattr(launcher, "torchrun", lambda resolved, arguments: command)
    return tmp_path


def ready(folder: Path) -> bool:
    return all((folder / f"ready-{rank}").is_file() and (folder / f"ready-{rank}").read_text() for rank in (0, 1))


def workers(folder: Path) -> list[int]:
    return [int((folder / f"ready-{rank}").read_text().split()[0]) for rank in (0, 1)]


def test_the_command_is_torchrun_with_the_plans_processes(two: Resolved) -> None:
    command = launcher.torchrun(two, ["-m", "sft_dist.train", "RUN"])
    assert command[:3] == [sys.executable, "-m", "sft_dist.jobs.elastic"]
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[-3:] == ["-m", "sft_dist.train", "RUN"]


def test_children_are_the_direct_ones_only() -> None:
    """The child has one of its own."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    before = set(launcher.children(os.getpid()))
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(lambda: bool(launcher.children(child.pid)))
        assert set(launcher.children(os.getpid())) - before == {child.pid}
        (grandchild,) = launcher.children(child.pid)
        os.kill(grandchild, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert launcher.children(child.pid) == []


def test_a_signal_reaches_every_worker_and_not_the_agent(two: Resolved, scripts: Path) -> None:
    heard: list[int] = []

    def ask() -> None:
        until(lambda: ready(scripts))
        heard.append(signal.SIGUSR1)

    threading.Thread(target=ask).start()
    run = RunDir(scripts / "run")
    assert launcher.run_workers(run, two, heard) == 0, "the agent was hit, or a worker did not hear"
    assert [(scripts / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]
    _, held, threads = (scripts / "ready-0").read_text().split()
    assert (held, threads) == (str(run.path), os.environ.get("OMP_NUM_THREADS", "4"))


def test_workers_inherit_nothing_that_accelerate_would_obey(
    two: Resolved, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "info")
    code = "import os; print(sorted(name for name in os.environ if name.startswith('ACCELERATE')))"
    (scripts / "agent.py").write_text(f"import pathlib, sys\nsys.stdout = open('seen', 'w')\n{code}\n")
    assert launcher.run_workers(RunDir(scripts / "run"), two, []) == 0
    assert Path("seen").read_text().strip() == "['ACCELERATE_LOG_LEVEL']"


@pytest.mark.parametrize(
    ("offload", "told", "threads"),
    [("cpu", None, "4"), ("cpu", "3", "3"), ("none", None, "None")],
    ids=["offloaded", "offloaded, the user's own", "on the GPU"],
)
def test_an_optimizer_on_the_host_has_its_share_of_the_cores(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, offload: str, told: str | None, threads: str
) -> None:
    """torchrun would set OMP_NUM_THREADS to 1 for each of several processes, and AdamW would step on one core."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    node = Machine(cpu="x", cores=8, cpu_bf16=False, memory_gib=64.0, gpus=(Gpu("NVIDIA H100", 80.0, 9.0),) * 2)
    resolved = resolve(Config.model_validate({"parallel": {"plan": "zero2", "offload": offload}}), node)
    threading.Thread(target=lambda: (until(lambda: ready(scripts)), heard.append(signal.SIGUSR1))).start()
    heard: list[int] = []
    assert launcher.run_workers(RunDir(scripts / "run"), resolved, heard) == 0
    assert [(scripts / f"ready-{rank}").read_text().split()[2] for rank in (0, 1)] == [threads] * 2


def test_a_signal_that_comes_before_the_workers_waits_for_them(
    two: Resolved, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun needs seconds to start them. Here they count as started once they can hear."""
    found = launcher.children
    monkeypatch.setattr(launcher, "children", lambda pid: found(pid) if ready(scripts) else [])
    assert launcher.run_workers(RunDir(scripts / "run"), two, [signal.SIGUSR1]) == 0
    assert [(scripts / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]


def test_a_signal_that_comes_while_workers_import_waits_until_they_can_hear(two: Resolved, scripts: Path) -> None:
    """Python and torch need seconds before a worker sets its handlers; until then it ignores what would end torchrun."""
    slow = f"import pathlib, sys, time\n(pathlib.Path(sys.argv[1]) / f'begun-{{sys.argv[2]}}').touch()\ntime.sleep(0.4)\n{WORKER}"
    (scripts / "worker.py").write_text(slow)
    heard: list[int] = []

    def ask() -> None:
        until(lambda: len(list(scripts.glob("begun-*"))) == 2)
        heard.append(signal.SIGUSR1)

    threading.Thread(target=ask).start()
    assert launcher.run_workers(RunDir(scripts / "run"), two, heard) == 0
    assert [(scripts / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]


def test_a_file_server_that_restarts_ends_no_training(
    two: Resolved, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """status.json is read once a second, by the launcher of every node, for as long as it trains."""
    asked: list[int] = []
    heard: list[int] = []

    def read_status(run: RunDir) -> dict[str, object]:
        asked.append(1)
        if ready(scripts) and not heard:
            heard.append(signal.SIGUSR1)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(launcher, "LOOK_S", 0.0)
    monkeypatch.setattr(RunDir, "read_status", read_status)
    assert launcher.run_workers(RunDir(scripts / "run"), two, heard) == 0
    assert asked
    assert [(scripts / f"heard-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1", "SIGUSR1"]


def test_whoever_leaves_at_once_leaves_no_worker_behind(two: Resolved, scripts: Path) -> None:
    class Impatient(list[int]):
        def __len__(self) -> int:
            if ready(scripts):
                raise KeyboardInterrupt
            return 0

    with pytest.raises(KeyboardInterrupt):
        launcher.run_workers(RunDir(scripts / "run"), two, Impatient())
    until(lambda: not any(alive(pid) for pid in workers(scripts)))
    assert not list(scripts.glob("heard-*")), "they were asked to save, not killed"


LAUNCHER = """
import sys
from pathlib import Path
from sft_dist.config.schema import Config
from sft_dist.jobs import launcher
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.resolve import resolve
from sft_dist.rundir import RunDir
folder = Path(sys.argv[1])
two = resolve(Config.model_validate({"parallel": {"plan": "ddp", "num_processes": 2}}), Machine("x", 8, False, 16.0, ()))
launcher.torchrun = lambda resolved, arguments: [sys.executable, str(folder / "agent.py"), str(folder / "worker.py"), str(folder)]
if sys.argv[2] == "alone":
    launcher.run_alone([str(folder / "worker.py"), str(folder), "0"])
else:
    launcher.run_workers(RunDir(folder / "run"), two, [])
"""


def test_a_launcher_that_is_killed_takes_its_agent_with_it(scripts: Path) -> None:
    """Else the workers would train on, unrecorded, beside those of the resume. torchrun passes the SIGTERM on."""
    killed = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(scripts), "workers"])
    until(lambda: ready(scripts))
    (agent,) = launcher.children(killed.pid)
    killed.kill()
    killed.wait()
    until(lambda: not alive(agent))
    assert not alive(agent)
    for pid in workers(scripts):  # this agent is no torchrun
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_runs_alone_ends_with_the_one_that_started_it(scripts: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(scripts), "alone"])
    until(lambda: (scripts / "ready-0").is_file())
    killed.kill()
    killed.wait()
    until(lambda: (scripts / "heard-0").is_file())
    assert (scripts / "heard-0").read_text() == "SIGTERM"


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_runs_alone_says_how_it_ended(status: int) -> None:
    assert launcher.run_alone(["-c", f"raise SystemExit({status})"]) == status


def test_what_workers_print_is_no_result(two: Resolved, scripts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (scripts / "agent.py").write_text("print('DeepSpeed built something')\n")
    assert launcher.run_workers(RunDir(scripts / "run"), two, []) == 0
    assert launcher.run_alone(["-c", "print('and something else')"]) == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["DeepSpeed built something", "and something else"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    RunDir(tmp_path).write_status(state="running", attempt=1)
    return Place("7", 0, ("n1", "n2"), 1, 1, 2, "n1", 20001, str(tmp_path))


@pytest.mark.parametrize("count", [1, 2])
def test_torchrun_stands_between_only_where_a_node_has_several_processes(
    count: int, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(
        run: RunDir,
        command: list[str],
        share: Workers,
        heard: object,
        over: object,
        extra: object = None,
        *_: object,
        **more: object,
    ) -> int:
        started.append((command, dict(extra or {})))  # type: ignore[call-overload]
        return 0

    monkeypatch.setattr(launcher, "_run", run)
    assert launcher.run_share(RunDir(tmp_path), Workers(count), [], place) == 0
    ((command, extra),) = started
    assert ("sft_dist.jobs.elastic" in command) == (count == 2)
    assert command[-3:] == ["-m", "sft_dist.train", str(tmp_path)]
    if count == 1:
        assert [extra[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == [
            "1",
            "2",
            "0",
            "1",
        ]
        assert (extra["MASTER_ADDR"], extra["MASTER_PORT"]) == ("n1", "20001")


@pytest.mark.parametrize(
    ("status", "heard", "said"),
    [(-9, [], True), (-11, [signal.SIGUSR2], True), (-15, [signal.SIGTERM], False), (137, [], False), (1, [], False)],
)
def test_who_was_killed_is_put_down_and_who_was_ended_is_not(
    status: int, heard: list[int], said: bool, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another task has noticed its own loss first, which is only what follows."""
    monkeypatch.setattr(launcher, "_run", lambda *_, **__: status)
    board_of(dataclasses.replace(place, task=0)).say("failed")
    assert launcher.run_share(RunDir(tmp_path), Workers(1), heard, place) == status
    assert [word.signal for word in read_words(RunDir(tmp_path), 1)] == ([-status] if said else [])


def test_a_worker_that_is_killed_here_has_not_been_killed_by_somebody(
    place: Place, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATIENCE_S", "LOOK_S"):
        monkeypatch.setattr(launcher, name, 0.0)
    command = [sys.executable, str(scripts / "worker.py"), str(scripts), "0"]
    status = launcher._run(RunDir(scripts), command, Workers(1), [], lambda: True, agent_is_worker=True)
    assert status == 128 + signal.SIGKILL
