"""Scores and report reach the trackers, in the same run as the curves, by their own clients without a network."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sft_dist.config.loader import load_run_config
from sft_dist.config.yaml12 import parse_yaml
from sft_dist.evaluate.tracked import flat_scores, tell_trackers
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here

if TYPE_CHECKING:
    from tests.conftest import RunCli

NewRun = Callable[..., RunDir]
SMALL = (
    "train.max_steps=2",
    "train.logging_steps=1",
    "train.eval_strategy=no",
    "data.eval_size=0",
    "data.train.sample=16",
    "evaluate.data={task: tickets, rows: 4}",
    "evaluate.labels=[]",
    "evaluate.questions=[]",
    "evaluate.generation.max_new_tokens=4",
)


def test_scores_by_set_and_side() -> None:
    scores = {"sets": {"data": {"scores": {"exact": {"before": 0.0, "after": 0.5, "change": 0.5, "unit": "share"}}}}}
    assert flat_scores(scores) == {
        "scores/data/exact/before": 0.0,
        "scores/data/exact/after": 0.5,
        "scores/data/exact/change": 0.5,
    }
    assert flat_scores({}) == flat_scores({"sets": {"data": {}}}) == {}


def test_tensorboard_has_the_scores(new_run: NewRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run(*SMALL, "tracking.report_to=[tensorboard]", "slurm.env={SITE: abc}")
    run_here(run)
    expected = flat_scores(read_json(run.scores))
    assert len(expected) == 3
    found, configs = {}, []
    for events in (run.logs / "tensorboard").rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        if "sft_dist/text_summary" in accumulator.Tags()["tensors"]:
            configs += [it.tensor_proto.string_val[0].decode() for it in accumulator.Tensors("sft_dist/text_summary")]
        for name in expected.keys() & set(accumulator.Tags()["scalars"]):
            found[name] = [(event.step, event.value) for event in accumulator.Scalars(name)]
    assert found == {name: [(2, pytest.approx(value))] for name, value in expected.items()}
    assert len(configs) == 2, "when the training begins, and with the scores"
    for text in configs:
        told = parse_yaml(text.strip("`\n"), "config")
        assert (told["data"]["train"]["sample"], told["resolved"]["plan"]) == (16, "cpu")
        assert "SITE" not in text


def test_wandb_has_scores_and_report_in_the_same_run(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = new_run(*SMALL, "tracking.report_to=[wandb]", "tracking.wandb_mode=offline")
    run_here(run)
    name = (run.logs / "wandb_run_id").read_text().strip()
    recordings = list((run.logs / "wandb").glob("offline-run-*"))
    assert recordings
    assert all(folder.name.endswith(name) for folder in recordings)
    # wandb's own process writes it, and is waited for when ours ends, not in finish().
    over = time.monotonic() + 30
    while b"scores/data/exact/after" not in (written := b"".join(it.read_bytes() for it in run.logs.rglob("*.wandb"))):
        assert time.monotonic() < over, "the scores did not come"
        time.sleep(0.1)
    assert written.count(b'"resolved"') >= 1
    assert b'"logging_steps"' in written and b'"generation"' in written, "the run's config, not only the arguments"
    pages = [path for folder in recordings for path in folder.rglob("*.html")]
    assert [path.read_bytes() for path in pages] == [run.report.read_bytes()]


def test_trackio_has_curves_and_scores(run_cli: RunCli, tmp_path: Path) -> None:
    """In a process of its own: trackio reads its folder from the environment when it is imported."""
    pytest.importorskip("trackio")
    words = (*SMALL, "tracking.report_to=[trackio]", "tracking.project=proj-x", "run.name=run")
    done = run_cli("train", "smoke", *words, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert done.returncode == 0, done.stderr
    assert "rackio" not in done.stdout
    run = RunDir(tmp_path / "runs" / "run")
    (database,) = (tmp_path / "trackio").glob("proj-x*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    with sqlite3.connect(database) as connection:
        configs = [json.loads(text) for (text,) in connection.execute("select config from configs")]
    assert [it["sft_dist"]["data"]["train"]["sample"] for it in configs] == [16]
    assert configs[0]["sft_dist"]["resolved"]["per_device_train_batch_size"] >= 1
    assert configs[0]["learning_rate"] > 0, "the scores' session leaves what transformers has said"
    # Scores and curves in the same run, which no other run of this name goes on with.
    assert {name for name, _, _ in rows} == {f"run-{(run.logs / 'wandb_run_id').read_text()[:6]}"}
    metrics: dict[str, list[Any]] = {}
    for _, _, text in rows:
        for name, value in json.loads(text).items():
            metrics.setdefault(name, []).append(value)
    assert metrics["train/loss"] == pytest.approx([row["loss"] for row in read_jsonl(run.metrics) if "loss" in row])
    for name, value in flat_scores(read_json(run.scores)).items():
        assert metrics[name] == [pytest.approx(value)]


def test_a_tracker_that_fails_then_is_said_and_costs_nothing(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch.utils.tensorboard as board

    def broken(*words: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(board, "SummaryWriter", broken)
    run = new_run(*SMALL, "tracking.report_to=[tensorboard]")
    tell_trackers(load_run_config(run.config), run)
    assert "tensorboard did not get scores and report: no space left" in caplog.text
