"""A real SLURM for tests: slurm/lab, started when the first test of a pytest process asks for it, gone when that ends.

Each xdist worker has labs of its own. They would meet otherwise: a test that preempts whatever runs, or kills a node's
daemon, would hit the tests of another worker.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMANDS = Path(__file__).resolve().parents[2] / "slurm" / "lab"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "my_print_defaults")
# Waits for a process and takes a lab down after it: a pytest that was killed runs no finalizer.
GUARD = """
import os, select, subprocess, sys
pytest, *down = sys.argv[1:]
select.select([os.pidfd_open(int(pytest))], [], [])
subprocess.run(down)
"""


@dataclass(frozen=True)
class Lab:
    """A running lab. Its commands need no environment: every call sets SLURM_CONF."""

    folder: Path
    options: tuple[str, ...]

    @property
    def env(self) -> Mapping[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def manage(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Call slurm/lab/up, down or status for this lab."""
        return _manage(self.folder, command, *words)

    def run(self, *words: str, timeout: float = 60, fails: bool = False) -> str:
        """What a command of SLURM prints on stdout. With `fails`, an error of the command is no error of the test."""
        env = {**os.environ, **self.env}
        done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        assert fails or done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """Queue a bash script, given as text; returns the job's number. Output goes to job-NUMBER.out in this folder."""
        words = ["sbatch", "--parsable", "--open-mode=append", "--output=job-%j.out", *options]
        Path("job.sh").write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        return self.run(*words, "job.sh").partition(";")[0]

    def output(self, job: str) -> str:
        path = Path(f"job-{job}.out")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """The fields that `scontrol show job` prints, such as JobState, Restarts and BatchHost."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait_for(self, job: str, *states: str, patience: float = 60) -> dict[str, str]:
        """The job's fields once it is in one of these states, COMPLETED if none is named."""
        wanted = states or ("COMPLETED",)
        self.eventually(lambda: self.job(job)["JobState"] in wanted, patience, job)
        return self.job(job)

    def wait_for_output(self, job: str, text: str, patience: float = 60) -> None:
        self.eventually(lambda: text in self.output(job), patience, job)

    def eventually(self, holds: Callable[[], bool], patience: float = 60, job: str = "") -> None:
        """Wait until `holds`. A test that waits in vain fails with what this job's fields and output are then."""
        deadline = time.monotonic() + patience
        while not holds():
            told = f": {self.job(job)}\n{self.output(job)}" if job else ""
            assert time.monotonic() < deadline, f"not so after {patience} s{told}"
            time.sleep(0.1)

    def hurry(self, job: str) -> None:
        """Let a requeued job start at once: SLURM makes it wait, for minutes on most clusters."""
        self.wait_for(job, "PENDING")
        # Not in the same second: slurmd then takes the new start for the one that was just revoked, and the job fails
        # with exit code 1:0.
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+1")

    @property
    def nodes(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N").split()

    def cancel_all(self) -> None:
        while jobs := self.run("squeue", "--noheader", "--format=%A", fails=True).split():
            self.run("scancel", *jobs, fails=True)
            time.sleep(0.2)


def _manage(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    line = [COMMANDS / command, "--dir", folder, *words]
    return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)


StartLab = Callable[..., Lab]
NewLab = Callable[..., "contextlib.AbstractContextManager[Lab]"]
Manage = Callable[..., "subprocess.CompletedProcess[str]"]


@contextlib.contextmanager
def _running(*options: str) -> Iterator[Lab]:
    """A lab with these options of slurm/lab/up while the block runs."""
    _skip_without_slurm()
    if "cgroup" in options and not _cgroups_are_writable():
        pytest.skip("proctrack/cgroup needs cgroups that can be written, and there are none here")
    # Not pytest's folders: sockets need short paths, and ordinary users must get in.
    lab = Lab(Path(tempfile.mkdtemp(prefix="slurm-lab-", dir="/tmp")), options)
    down = [str(COMMANDS / "down"), "--dir", str(lab.folder)]
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(os.getpid()), *down],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        done = lab.manage("up", *options)
        assert done.returncode == 0, done.stderr
        yield lab
    finally:
        done = lab.manage("down")
        guard.kill()
        guard.wait()
        shutil.rmtree(lab.folder, ignore_errors=True)
        assert done.returncode == 0, done.stderr


def _skip_without_slurm() -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in NEEDED if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"needs a SLURM: {', '.join(missing)} not installed here (slurm/README.md says how)")
    if os.geteuid() != 0:
        pytest.skip("needs root: slurm/lab starts a cluster that runs jobs as any user")


def _cgroups_are_writable() -> bool:
    roots = (Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup/cgroup.controllers"))
    return any(root.exists() and os.access(root, os.W_OK) for root in roots)


@pytest.fixture
def manage() -> Manage:
    """`manage(folder, "up", "--nodes=1")` calls slurm/lab/up, down or status."""
    return _manage


@pytest.fixture
def new_lab() -> NewLab:
    """`with new_lab("--nodes=1") as other:` for a test that wants a lab to itself."""
    return _running


@pytest.fixture(scope="session")
def start_lab(session_environment: dict[str, str]) -> Iterator[StartLab]:
    """`start_lab("--no-accounting")` starts a lab with these options, or returns the one that this process has."""
    with contextlib.ExitStack() as stack:
        labs: dict[tuple[str, ...], Lab] = {}

        def start(*options: str) -> Lab:
            if options not in labs:
                labs[options] = stack.enter_context(_running(*options))
            else:
                # A test before may have ended a daemon or taken a node down.
                done = labs[options].manage("up", *options)
                assert done.returncode == 0, done.stderr
            return labs[options]

        yield start


@pytest.fixture
def use_lab(start_lab: StartLab, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartLab]:
    """As start_lab, and this test's own process sees that cluster too; its jobs are cancelled after the test."""
    used = []

    def use(*options: str) -> Lab:
        used.append(start_lab(*options))
        for name, value in used[-1].env.items():
            monkeypatch.setenv(name, value)
        return used[-1]

    yield use
    for lab in used:
        lab.cancel_all()


@pytest.fixture
def lab(use_lab: StartLab) -> Lab:
    """Two nodes with two fake GPUs each and accounting, under proctrack/linuxproc."""
    return use_lab()


@pytest.fixture(params=["linuxproc", "cgroup"])
def each_lab(use_lab: StartLab, request: pytest.FixtureRequest) -> Lab:
    """The same under both proctrack plugins, for what depends on which processes get a signal."""
    return use_lab() if request.param == "linuxproc" else use_lab("--proctrack", request.param)
