"""A node that goes down under a run, on a real SLURM."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sft_dist.files import read_jsonl
from sft_dist.jobs.launcher import children
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.faults.conftest import MakeRun, Server

pytestmark = pytest.mark.slurm
pytest.importorskip("submitit")
PATIENCE = 300
ENV = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
STEPS = 400


@pytest.fixture
def lab(session_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A SLURM of two nodes; this process sees it, too."""
    spec = importlib.util.spec_from_file_location("slurm_lab", Path(__file__).parents[1] / "slurm" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    labs = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up.
    monkeypatch.setitem(sys.modules, spec.name, labs)
    spec.loader.exec_module(labs)
    with labs._running() as running:
        for name, value in running.env.items():
            monkeypatch.setenv(name, value)
        yield running
        running.cancel_all()


def test_a_node_that_goes_down(lab: Any, run_cli: RunCli, server: Server, make_run: MakeRun, tmp_path: Path) -> None:
    """SLURM requeues the job by itself, on the other node; the attempt that left no word gets one from the next."""
    options = ("parallel.plan=cpu", f"train.max_steps={STEPS}", "checkpoint.save_steps=20", "train.eval_steps=100")
    run = make_run(tmp_path, "node", *options, "slurm.time=10", "slurm.cpus_per_task=1")
    done = run_cli("submit", run.path, env=ENV)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-2]
    lab.eventually(lambda: (run.read_status().get("checkpoint") or "-") != "-", PATIENCE, job)
    node = lab.job(job)["BatchHost"]
    lose(lab, node, run)
    lab.hurry(job)
    lab.wait_for(job, patience=PATIENCE)
    first, second = read_jsonl(run.attempts)
    assert (first["decided"], first["failure"]["kind"]) == ("lost", "node")
    assert second["decided"] == "done"
    assert second["nodes"] == [name for name in lab.nodes if name != node]
    assert 0 < second["first_step"] < STEPS
    straight = make_run(tmp_path, "straight", *options)
    assert server.live(straight).code == 0
    assert losses(run) == losses(straight)


def lose(lab: Any, node: str, run: RunDir) -> None:
    """Node and all that ran on it are gone: its daemon, the job's steps and what they started."""
    daemon = re.search(rf"^slurmd\.{node} +process (\d+)$", lab.manage("status").stdout, re.M)
    assert daemon is not None
    words = [b"slurmstepd", str(run.path).encode()]
    gone = {int(daemon[1])}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if words[1] in said or (words[0] in said and str(lab.folder).encode() in said):
                    gone |= {int(entry.name), *descendants(int(entry.name))}
    # All at once, as a machine goes: the job's script would else see its task end, and ask for a requeue.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    lab.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from descendants(child)


def losses(run: RunDir) -> list[tuple[Any, ...]]:
    """Not the row on how long a save took: the node may go between the checkpoint that counts and that row."""
    names = ("step", "loss", "grad_norm", "eval_loss")
    rows = [tuple(row.get(name) for name in names) for row in read_jsonl(run.metrics) if "save_stall_s" not in row]
    assert len(rows) == STEPS + STEPS // 100
    return rows
