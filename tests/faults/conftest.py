"""What the fault tests share: the warm server, tiny runs, and a life of a run with a fault in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import read_jsonl
from sft_dist.jobs.stacks import state_of
from sft_dist.rundir import RunDir
from tests.cpu.conftest import new_run as new_run
from tests.cpu.conftest import no_proxy as no_proxy
from tests.cpu.conftest import serve as serve
from tests.cpu.conftest import tiny_model as tiny_model
from tests.cpu.conftest import tiny_tokens as tiny_tokens
from tests.distributed.conftest import cpu_environment as cpu_environment
from tests.distributed.conftest import start as start
from tests.distributed.conftest import tiny_run as tiny_run

SERVER = Path(__file__).with_name("warm.py")
# A start takes seconds; whatever has not ended by then hangs.
PATIENCE_S = 120.0
STEPS = 24
SMALL = (
    f"train.max_steps={STEPS}",
    "train.global_batch_size=4",
    "train.per_device_train_batch_size=2",
    "train.logging_steps=1",
    "train.eval_strategy=steps",
    "train.eval_steps=5",
    "train.per_device_eval_batch_size=2",
    "data.train={task: mix, rows: 44, seed: 1}",
    "data.eval_size=8",
    "checkpoint.save_strategy=steps",
    "checkpoint.save_steps=3",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
    "model.dtype=float32",
)
TWO = ("parallel.plan=ddp", "parallel.num_processes=2")
ONE = ("parallel.plan=cpu",)

Fault = dict[str, Any]


@dataclass(frozen=True)
class Life:
    """One start of a run, and how it ended."""

    code: int
    """Exit status of the command; negative: the signal that killed it."""
    said: str
    seconds: float
    lines: tuple[dict[str, Any], ...]
    """What attempts.jsonl got."""
    status: dict[str, Any]

    @property
    def line(self) -> dict[str, Any]:
        return self.lines[-1]

    @property
    def kind(self) -> str:
        return str(self.line["failure"]["kind"])


class Server:
    """Starts commands as forks of a process that has everything imported."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.environment, self.folder = dict(environment), folder
        self._log = (folder / "server.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        assert self._answer() is not None

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self.folder / "server.log").read_text()
        return json.loads(line)

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def start(self, *words: str, faults: Sequence[Fault] = (), out: Path, **variables: str) -> int:
        env = {**self.environment, **variables, "FAULTS": json.dumps(list(faults))}
        return int(self._ask(start=["-m", *words], env=env, out=str(out)))

    def poll(self, pid: int) -> int | None:
        found = self._ask(poll=pid)
        return None if found is None else int(found)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()

    def live(
        self,
        run: RunDir,
        *faults: Fault,
        meanwhile: Callable[[int], None] | None = None,
        patience: float = PATIENCE_S,
        **variables: str,
    ) -> Life:
        """Go on with `run`, with these faults, to the end of this attempt. `meanwhile` gets the command's process id."""
        out, before, began = run.path.with_suffix(".out"), len(read_jsonl(run.attempts)), time.monotonic()
        offset = out.stat().st_size if out.exists() else 0
        pid = self.start(
            "sft_dist", "resume", str(run.path), faults=faults, out=out, FAULTS_PIDS=str(pids_folder(run)), **variables
        )
        try:
            if meanwhile is not None:
                meanwhile(pid)
            while (code := self.poll(pid)) is None:
                assert time.monotonic() - began < patience, f"it hangs:\n{out.read_text()[offset:]}"
                time.sleep(0.02)
            # Of a command that was killed the workers save and end by themselves.
            while left := processes_of(run):
                assert time.monotonic() - began < patience, f"{left} are left behind:\n{out.read_text()[offset:]}"
                time.sleep(0.02)
        except BaseException:
            for other in [pid, *processes_of(run)]:
                os.kill(other, signal.SIGKILL)
            raise
        lines = tuple(read_jsonl(run.attempts)[before:])
        seconds = time.monotonic() - began
        return Life(code, out.read_text(errors="replace")[offset:], seconds, lines, run.read_status())


def processes_of(run: RunDir) -> list[int]:
    """The processes of this run that are there: command, agent, workers."""
    found = [int(path.name) for path in pids_folder(run).iterdir()]
    return [pid for pid in found if state_of(pid) not in "XZ"]


def pids_folder(run: RunDir) -> Path:
    folder = run.path.with_suffix(".pids")
    folder.mkdir(exist_ok=True)
    return folder


MakeRun = Callable[..., RunDir]


@pytest.fixture(scope="session")
def server(session_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    inherited = {**os.environ, **session_environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = Server(tmp_path_factory.mktemp("server"), {**inherited, "NO_COLOR": "1", "COLUMNS": "200"})
    yield started
    started.close()


@pytest.fixture(scope="session")
def make_run(session_environment: dict[str, str], tiny_model_dir: Path) -> MakeRun:
    """`make_run(folder, "name", *TWO, "train.max_steps=2")` creates a small run that evaluates and saves."""
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--injections", type=int, default=8, help="how many signals test_injections.py sends (default: 8)")
    parser.addoption("--seed", type=int, default=None, help="seed of their moments and receivers (default: a new one)")
    parser.addoption("--injections-out", default=None, help="file for what each of them did and cost, as JSON")
