"""What a launcher makes of the end of its workers. The workers here are what they leave."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_dist import stages
from sft_dist.config.schema import Config
from sft_dist.errors import RunStopped, SftDistError
from sft_dist.files import read_jsonl
from sft_dist.jobs import launcher
from sft_dist.jobs.requeue import Settler
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.resolve import resolve
from sft_dist.rundir import RunDir
from sft_dist.train.attempt import Attempt
from sft_dist.train.shutdown import StopRequest

LAPTOP = Machine(cpu="x", cores=8, cpu_bf16=False, memory_gib=16.0, gpus=())
KILLED = {"state": "failed", "reason": "rank 1 (process 7) was killed by SIGABRT", "exit_status": 1}
STOPPED = {"state": "stopped", "reason": "stopped by SIGUSR2 at step 8", "exit_status": 0}


@pytest.mark.parametrize(
    ("left", "done", "heard", "error", "says"),
    [
        ({"state": "running"}, True, [], None, ""),
        (KILLED, True, [], None, ""),
        (KILLED, True, [12], RunStopped, "the model is complete"),
        (KILLED, False, [], SftDistError, "was killed by SIGABRT"),
        (STOPPED, False, [12], RunStopped, "stopped by SIGUSR2 at step 8"),
        ({"state": "running"}, False, [], SftDistError, "ended with exit status 1"),
    ],
)
def test_a_complete_model_is_one_however_its_processes_ended(
    left: dict[str, Any],
    done: bool,
    heard: Sequence[int],
    error: type[SftDistError] | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDir(tmp_path)
    run.write_status(state="running", first_step=4, last_step=8)
    two = resolve(Config.model_validate({"parallel": {"plan": "ddp", "num_processes": 2}}), LAPTOP)

    def run_workers(*_: Any) -> int:
        run.write_status(**left)
        if done:
            run.model.mkdir()
            (run.model / "DONE").touch()
        return 1

    monkeypatch.setattr(launcher, "run_workers", run_workers)
    current = Attempt(StopRequest())
    current.stop.heard += heard
    with contextlib.nullcontext() if error is None else pytest.raises(error, match=says) as caught:
        stages._train(run, current, two, None)
    assert error is None or type(caught.value) is RunStopped or error is SftDistError
    assert (current.facts["first_step"], current.facts["last_step"]) == (4, 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_comes_before_the_attempt_is_on_record_is_not_lost(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("data: {train: {task: tickets}}\n")
    begin = Settler.begin

    def interrupted(self: Settler) -> None:
        os.kill(os.getpid(), number)
        begin(self)

    monkeypatch.setattr(Settler, "begin", interrupted)
    monkeypatch.setattr("sft_dist.train.settle.resolve_here", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(RunStopped):
        stages.run_here(run)
    (line,) = read_jsonl(run.attempts)
    assert line["ended"] == run.read_status()["state"] == "stopped"
    assert signal.Signals(number).name in line["reason"]
    assert line["failure"]["evidence"] == signal.Signals(number).name
