"""Trackers write beside the run, and nothing that happens to them stops a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here

NewRun = Callable[..., RunDir]
TRAINING = (
    "evaluate.before=false",
    "evaluate.after=false",
    "train.max_steps=4",
    "train.eval_strategy=no",
    "data.eval_size=0",
)


def finished(run: RunDir) -> bool:
    steps = [row["step"] for row in read_jsonl(run.metrics) if "loss" in row]
    return run.read_status()["state"] == "done" and steps == [1, 2, 3, 4]


def test_tensorboard_writes_into_the_runs_logs(new_run: NewRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run(*TRAINING, "tracking.report_to=[tensorboard]")
    run_here(run)
    assert finished(run)
    events, *_ = sorted((run.logs / "tensorboard").rglob("events.out.tfevents.*"))  # the scores have one of their own
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    written = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    expected = [(row["step"], row["loss"]) for row in read_jsonl(run.metrics) if "loss" in row]
    assert written == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]


def test_wandb_offline_writes_into_the_runs_logs(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = new_run(*TRAINING, "tracking.report_to=[wandb]", "tracking.wandb_mode=offline", "tracking.project=proj-x")
    run_here(run)
    assert finished(run)
    files = list((run.logs / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    assert b"proj-x" in content


def test_every_attempt_is_the_same_run_of_wandb_in_the_runs_folder(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    from sft_dist.config.loader import load_run_config
    from sft_dist.train.trackers import trackers

    run = new_run("tracking.report_to=[wandb]")
    names = []
    for _ in range(2):
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
        trackers(load_run_config(run.config), run)
        assert (os.environ["WANDB_DIR"], os.environ["WANDB_RESUME"]) == (str(run.logs), "allow")
        names.append(os.environ["WANDB_RUN_ID"])
    assert names[0] == names[1]


def test_the_environment_goes_before_the_config(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from sft_dist.config.loader import load_run_config
    from sft_dist.train.trackers import trackers

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = new_run("tracking.wandb_mode=online")
    assert trackers(load_run_config(run.config), run) == []
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_PROJECT"]) == ("disabled", "mine")


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin", "on_log", "on_step_end", "on_save", "on_train_end"])
def test_a_tracker_that_fails_is_reported_once_and_the_training_goes_on(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    from transformers.integrations import TensorBoardCallback

    calls: list[str] = []

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(event)
        raise ConnectionError("the tracker's server is away")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    run = new_run(*TRAINING, "tracking.report_to=[tensorboard]")
    run_here(run)
    assert finished(run)
    assert calls == [event], "it was asked again after it had failed"
    warnings = [record for record in caplog.records if "the tracker's server is away" in record.getMessage()]
    assert len(warnings) == 1
    assert "tensorboard failed" in warnings[0].getMessage()


def test_a_tracker_that_cannot_be_set_up_is_left_out(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.integrations import TensorBoardCallback

    class ServerError(Exception):
        """An error of the tracker's own, as client libraries have them."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ServerError("no such project")

    monkeypatch.setattr(TensorBoardCallback, "__init__", fail)
    run = new_run(*TRAINING, "tracking.report_to=[tensorboard]")
    run_here(run)
    assert finished(run)
    assert "no such project" in caplog.text


def test_a_tracker_that_is_not_installed_is_left_out_with_a_warning(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    run = new_run(*TRAINING, "tracking.report_to=[wandb, tensorboard]")
    run_here(run)
    assert finished(run)
    assert "tracking.report_to: wandb is left out" in caplog.text
    assert list((run.logs / "tensorboard").rglob("events.out.tfevents.*")), "the other tracker is gone too"


def test_a_guarded_callback_cannot_steer_the_training() -> None:
    """A tracker's callback may return a control; only ours decide when to stop and save."""
    from sft_dist.train.trackers import Guarded

    class Greedy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> str:
            return "control of its own"

    guarded = Guarded("greedy", Greedy())
    assert guarded.on_step_end(None, None, None) is None
    assert guarded.on_a_new_event_of_the_future(None) is None


def test_no_tracker_unless_asked_for(new_run: NewRun) -> None:
    run = new_run(*TRAINING, "train.max_steps=1")
    run_here(run)
    assert list(run.logs.rglob("*")) == []
