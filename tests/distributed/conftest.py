"""What the tests with several processes share: tiny runs, and a launch that trains many of them in the same processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from sft_dist.rundir import RunDir

TinyRun = Callable[..., RunDir]
Launch = Callable[..., str]
Start = Callable[..., "subprocess.Popen[str]"]

MANY = Path(__file__).with_name("many.py")
# Rows of unequal lengths, with unequal numbers of trained tokens; nothing beside the training.
SMALL = (
    "data.train={task: mix, rows: 160, seed: 1}",
    "data.eval_size=0",
    "train.eval_strategy=no",
    "checkpoint.save_strategy=no",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
    "model.dtype=float32",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the package deepspeed, not installed here (make setup)")


@pytest.fixture(scope="session")
def cpu_environment(session_environment: dict[str, str]) -> Mapping[str, str]:
    """What processes are started with here: no GPU, and one thread each, since each has one core at best."""
    return {**os.environ, **session_environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def tiny_run(session_environment: dict[str, str], tiny_model_dir: Path) -> TinyRun:
    """`tiny_run(folder, "name", "train.max_steps=2")` creates a small run of the smoke recipe with these overrides.

    It is not proven to run here, so that the plan need not say how many processes will train it.
    """
    from sft_dist import stages
    from sft_dist.config.loader import load_config

    def make(folder: Path, name: str, *overrides: str) -> RunDir:
        fields = {override.partition("=")[0] for override in overrides}
        small = [default for default in SMALL if default.partition("=")[0] not in fields]
        loaded = load_config("smoke", [f"run.name={name}", f"run.dir={folder}", *small, *overrides])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "prove_here", lambda config, run: [])
            return stages.new_run(loaded)

    return make


@pytest.fixture
def start(cpu_environment: Mapping[str, str], tmp_path: Path) -> Iterator[Start]:
    """`start("-m", "sft_dist", "resume", run.path)` starts Python with these words, in the test's folder; ends them after it."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str | Path, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env={**cpu_environment, "COLUMNS": "200", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=120)


@pytest.fixture(scope="session")
def launch(cpu_environment: Mapping[str, str]) -> Launch:
    """`launch({2: [run.path, f"{other.path}@3:1"], "2x2": [third.path]})` trains runs with two, then with four processes.

    See many.py. Returns what all processes wrote to stdout and stderr.
    """

    def start(worlds: Mapping[int | str, Iterable[Path | str]]) -> str:
        words = [str(word) for size, arms in worlds.items() for word in (size, *arms, "/")]
        process = subprocess.Popen(
            [sys.executable, str(MANY), *words],
            env=dict(cpu_environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=400)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, output[-8000:]
        return output

    return start
