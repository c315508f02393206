"""`sft-dist train` in an image, stopped from outside and resumed; docker and apptainer are stand-ins that start the real training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from tests.container_fakes import container_env, make_image
from tests.faults.conftest import ONE, PATIENCE_S, SMALL


def wait_for(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    """Until `holds`; the test fails if the process ends before, or takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_a_run_in_an_image_stops_and_resumes(runtime: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    image = make_image(tmp_path / "image")
    env = {**os.environ, **container_env(tmp_path, "docker", "apptainer")}
    fields = (f"container.runtime={runtime}", f"container.image={image}", f"model.name={tiny_model_dir}")
    long = ("train.max_steps=2000", "checkpoint.save_strategy=no", "checkpoint.save_steps=null", "run.name=inside")
    command = [sys.executable, "-m", "sft_dist", "train", "smoke", *SMALL, *ONE, *long, *fields]
    process = subprocess.Popen(command, env=env)
    run = RunDir(tmp_path / "runs" / "inside")
    wait_for(process, lambda: len(read_jsonl(run.metrics)) > 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 75
    assert run.read_status()["state"] == "stopped"
    step = run.read_status()["step"]
    process = subprocess.Popen([sys.executable, "-m", "sft_dist", "resume", "inside"], env=env)
    wait_for(process, lambda: read_jsonl(run.metrics)[-1]["step"] > step + 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 75
    attempts = read_jsonl(run.attempts)
    assert [attempt["last_step"] for attempt in attempts[:1]] == [attempt["first_step"] for attempt in attempts[1:]]
    verbs = [line for line in (tmp_path / "calls").read_text().splitlines() if '"-m", "sft_dist"' in line]
    assert ["train" in verbs[0], "resume" in verbs[1], len(verbs)] == [True, True, 2]
