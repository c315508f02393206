"""The job scripts in slurm/, run by a real bash with stand-ins for SLURM and for python; tests/unit/test_refs.py compares them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.jobs.examples import EXAMPLES, example_files, example_options, sbatch_lines
from sft_dist.jobs.place import FIRST_PORT, LAST_PORT
from sft_dist.jobs.script import script_text

FILES = {Path(name).stem: text for name, text in example_files().items()}
each = pytest.mark.parametrize("name", list(FILES))

# Starts the task as srun would, for a job of one node; its own options end where the command begins.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_NODEID=0
exec "$@"
"""
# The agent and the worker in one: it notes how it was called, trains (WORKER), and leaves the run's state.
PYTHON = """#!/bin/bash
if [ "$2" = sft_dist ]; then echo "runs/my run"; exit; fi
printf '%s\\0' "$@" >called
mkdir -p "runs/my run"
eval "$WORKER"
"""
DONE = 'mkdir "runs/my run/model"; touch "runs/my run/model/DONE"'
# Not bash: it cannot trap a signal that it was started to ignore, as workers are until they have handlers.
TRAINS = f"""
cat >worker.py <<'INNER'
import json, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("runs/my run/status.json").write_text(json.dumps({{"state": "stopped"}}, indent=2))
    sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
pathlib.Path("started").touch()
for _ in range(600):
    time.sleep(0.05)
INNER
{shlex.quote(sys.executable)} worker.py &
wait
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start("multi-node", "my.yaml", WORKER="...")` runs the script as sbatch's shell does on the first node."""
    tools = tmp_path / "bin"
    tools.mkdir()
    hosts = '#!/bin/sh\nif [ "$1" = show ]; then echo n1; echo n2; else echo "$@" >asked; fi\n'
    briefly = "#!/bin/sh\nexec /bin/sleep 0.1\n"  # between two looks at the agent: the script's is a second
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": hosts, "sleep": briefly}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(name: str, *words: str, **env: str) -> subprocess.Popen[str]:
        (tmp_path / "script").write_text(FILES[name])
        job = {"SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "1"}
        merged = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **job, "SLURM_GPUS_ON_NODE": "2", **env}
        return subprocess.Popen(["bash", "script", *words], env=merged, stderr=subprocess.PIPE, text=True)

    return run


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    error = process.communicate(timeout=30)[1]
    return process.returncode, error


@each
def test_it_asks_for_what_submit_would(name: str, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    options = example_options(EXAMPLES[name])
    of_submit = re.findall(r"^#SBATCH --(.*)$", script_text(options, tmp_path, "python"), re.MULTILINE)
    ours = re.findall(r"^#SBATCH --(.*)$", FILES[name], re.MULTILINE)
    own = {"open-mode=append", "output=%x-%j.log"}
    shared = {line for line in of_submit if not line.startswith(("output=", "error=", "open-mode="))} - {
        "wckey=submitit"
    }
    assert set(ours) - own == shared
    assert set(sbatch_lines(options)) == {f"--{line}" for line in shared}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, "my.yaml") for name in FILES),
        *(("multi-node", it) for it in ("a b'c.yaml", "$(touch pwned)", "`touch pwned`;*")),
    ],
)
def test_it_starts_a_process_on_each_gpu(
    name: str, config: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert ended(start(name, config, WORKER=DONE)) == (0, "")
    called = (tmp_path / "called").read_text().split("\0")[:-1]
    assert called[:2] == ["-m", "sft_dist.jobs.elastic"]
    assert called[-5:] == ["--nproc-per-node", "2", "-m", "sft_dist.train", config]
    if EXAMPLES[name].nodes_meet:
        assert called[called.index("--master-addr") + 1] == "n1"
        assert FIRST_PORT <= int(called[called.index("--master-port") + 1]) <= LAST_PORT
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("10", False)])
def test_a_signal_reaches_the_workers_and_the_job_comes_back_under_a_cap(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, restarts: str, requeued: bool
) -> None:
    process = start("single-node", "my.yaml", WORKER=TRAINS, SLURM_RESTART_COUNT=restarts)
    _signal_the_task(process, tmp_path, signal.SIGUSR2)
    code, error = ended(process)
    assert (tmp_path / "asked").exists() == requeued
    assert code == (0 if requeued else 75)
    assert ("not requeued again" in error) != requeued


def _signal_the_task(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    """As with proctrack/cgroup: only what srun has started hears it."""
    deadline = time.monotonic() + 20
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (task,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(task), number)


def test_a_requeued_job_goes_on_with_its_run(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "runs" / "my run").mkdir(parents=True)
    (tmp_path / "runs" / "my run" / "config.yaml").touch()
    assert ended(start("multi-node", "my.yaml", WORKER=DONE, SLURM_RESTART_COUNT="1"))[0] == 0
    assert (tmp_path / "called").read_text().split("\0")[-2] == "runs/my run"


@pytest.mark.parametrize("worker", ["exit 3", 'echo "  \\"state\\": \\"stopped\\"" >"runs/my run/status.json"; exit 3'])
def test_what_fails_is_not_requeued(start: Callable[..., subprocess.Popen[str]], tmp_path: Path, worker: str) -> None:
    assert ended(start("preemptible", "my.yaml", WORKER=worker))[0] == 3
    assert not (tmp_path / "asked").exists()


@each
def test_without_a_config_it_says_how(name: str, start: Callable[..., subprocess.Popen[str]]) -> None:
    code, error = ended(start(name))
    assert code == 2
    assert f"{name}.sbatch CONFIG|RUN" in error


def test_what_was_not_run_says_so() -> None:
    assert [name for name, text in FILES.items() if "NOT RUN" in text] == ["container"]
