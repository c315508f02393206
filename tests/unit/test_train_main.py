"""Tests of `python -m sft_dist.train`: which of several processes says what is wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError, PreflightError, RunStopped, SftDistError
from sft_dist.parallel.world import World
from sft_dist.rundir import RunDir
from sft_dist.train import __main__ as worker
from sft_dist.train.ranks import MainFailed, Ranks

WRONG = ConfigError("the config is wrong", problems=["train.x: unknown"])
MISSING = PreflightError("no GPU here", hint="look at nvidia-smi")


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "waits", "says"),
    [
        (0, 0, WRONG, False, "error: the config is wrong\n  train.x: unknown\n"),
        (1, 1, WRONG, True, "rank 1: error: the config is wrong\n  train.x: unknown\n"),
        (2, 0, WRONG, True, "rank 2: error: the config is wrong\n  train.x: unknown\n"),
        (1, 1, MISSING, True, "rank 1: error: no GPU here\n  look at nvidia-smi\n"),
        (2, 0, MISSING, False, "rank 2: error: no GPU here\n"),
        (1, 1, MainFailed("the main process failed"), True, ""),
    ],
)
def test_a_process_lets_the_main_one_speak_before_it_ends(
    rank: int,
    local_rank: int,
    error: SftDistError,
    waits: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The launcher ends all processes once one has ended, also the main one, before it has said why."""
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        assert capsys.readouterr().err == "", "first it waits"
        waited.append(seconds)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker.time, "sleep", sleep)
    monkeypatch.setattr(worker, "_train", fail)
    assert worker.main(["somewhere"]) == error.exit_code
    assert bool(waited) == waits
    assert capsys.readouterr().err == says


@pytest.mark.parametrize("launched", [True, False])
def test_the_only_worker_of_a_launcher_hears_a_signal_twice_as_one_of_several_does(
    launched: bool, tmp_path: Path
) -> None:
    """`torchrun --nproc-per-node 1`, where a signal hits all processes of the job."""
    started = worker._started(World(launched=launched))
    with (
        pytest.raises(RunStopped) as left,
        worker._entered(RunDir(tmp_path), Ranks(), started=started) as current,
        current.stop.deferred(),
    ):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise RunStopped("stopped by SIGINT at step 3")
    assert ("at step 3" in str(left.value)) == launched


def test_a_run_that_is_there_already_has_a_way_on_without_options(tmp_path: Path) -> None:
    """The words of `sft-dist train` were shown: run.name=... and --overwrite, which this command does not take."""
    config = tmp_path / "mine.yaml"
    config.write_text("extends: smoke\nrun: {name: here}\n")
    run = worker.open_run(str(config), {})
    with pytest.raises(ConfigError, match="already exists") as refused:
        worker.open_run(str(config), {})
    said = str(refused.value)
    assert f"go on with it  {run.quoted} in place of {config}" in said
    assert "--overwrite" not in said
    run.model.mkdir()
    (run.model / "DONE").touch()
    with pytest.raises(ConfigError) as refused:
        worker.open_run(str(config), {})
    assert "go on" not in str(refused.value)


def test_overrides_are_told_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.main(["smoke", "run.name=a"]) == 2
    assert "stand in CONFIG" in capsys.readouterr().err
